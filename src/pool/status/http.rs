//! The HTTP requests and answers of the status server.
//!
//! The server needs only the request line. It skips the headers, answers once, and closes the
//! connection (HTTP/1.0, RFC 1945). The answer to anything but a valid request is an error.

use super::Status;

/// Maximum size of a request's line and headers, in bytes.
///
/// With a higher limit, hostile clients use more memory: up to `MAX_CLIENTS` requests of this size.
/// Browsers send up to a few KiB of cookies, so a lower limit may reject them.
pub(super) const MAX_REQUEST: usize = 8 * 1024;

/// The parts of a request on which the answer depends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Whether the answer must have no body.
    is_head: bool,
    resource: Result<Resource, Rejection>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resource {
    Metrics,
    Health,
    Text,
    Json,
}

/// The reason why the answer to a request is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rejection {
    BadRequest,
    NotFound,
    MethodNotAllowed,
    TooLarge,
}

/// Parses the bytes that a client has sent until now. Returns `None` if the headers have not ended.
pub(super) fn parse(received: &[u8]) -> Option<Request> {
    let rejected = |rejection| Request {
        is_head: false,
        resource: Err(rejection),
    };
    let head = &received[..received.len().min(MAX_REQUEST)];
    if !has_ended(head) {
        return (head.len() == MAX_REQUEST).then_some(rejected(Rejection::TooLarge));
    }
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    Some(parse_line(line).unwrap_or(rejected(Rejection::BadRequest)))
}

/// Returns whether the headers have ended with an empty line. As in RFC 9112, section 2.2, a line
/// may also end without a carriage return.
fn has_ended(head: &[u8]) -> bool {
    head.windows(2).any(|end| end == b"\n\n") || head.windows(3).any(|end| end == b"\n\r\n")
}

/// Returns `None` if the line is not a request line of HTTP/1.
fn parse_line(line: &[u8]) -> Option<Request> {
    let mut parts = line.split(|byte| *byte == b' ');
    let (method, target, version) = (parts.next()?, parts.next()?, parts.next()?);
    let is_valid = parts.next().is_none()
        && !method.is_empty()
        && target.starts_with(b"/")
        && matches!(version, b"HTTP/1.0" | b"HTTP/1.1");
    if !is_valid {
        return None;
    }
    let path = target.split(|byte| *byte == b'?').next()?;
    let resource = match path {
        b"/metrics" => Ok(Resource::Metrics),
        b"/health" => Ok(Resource::Health),
        b"/status" => Ok(Resource::Text),
        b"/status.json" => Ok(Resource::Json),
        _ => Err(Rejection::NotFound),
    };
    let is_allowed = matches!(method, b"GET" | b"HEAD");
    Some(Request {
        is_head: method == b"HEAD",
        resource: resource.and_then(|resource| match is_allowed {
            true => Ok(resource),
            false => Err(Rejection::MethodNotAllowed),
        }),
    })
}

const TEXT: &str = "text/plain; charset=utf-8";

impl Request {
    /// Returns the complete answer. Calls `status` only if the request is valid.
    pub(super) fn answer(self, status: impl FnOnce() -> Status) -> Vec<u8> {
        let (line, kind, body) = match self.resource {
            Ok(resource) => resource.content(&status()),
            Err(rejection) => {
                let line = rejection.line();
                (line, TEXT, format!("{line}\n"))
            }
        };
        // Add the header that RFC 9110, section 15.5.6, requires.
        let allow = match self.resource {
            Err(Rejection::MethodNotAllowed) => "Allow: GET, HEAD\r\n",
            _ => "",
        };
        let length = body.len();
        let head = format!(
            "HTTP/1.0 {line}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{allow}\
             Cache-Control: no-store\r\nConnection: close\r\n\r\n"
        );
        let body = if self.is_head { "" } else { &body };
        [head.as_bytes(), body.as_bytes()].concat()
    }
}

impl Resource {
    /// Returns the status line without the version, the content type, and the body.
    fn content(self, status: &Status) -> (&'static str, &'static str, String) {
        const OK: &str = "200 OK";
        match self {
            Self::Metrics => (
                OK,
                "text/plain; version=0.0.4; charset=utf-8",
                status.to_prometheus(),
            ),
            Self::Text => (OK, TEXT, status.to_string()),
            Self::Json => (OK, "application/json", status.to_json() + "\n"),
            Self::Health => {
                const UNAVAILABLE: &str = "503 Service Unavailable";
                let (line, state) = match (status.is_stopping, status.is_ready) {
                    // The new master serves the clients. It does not have this client, because the
                    // client connected before the takeover.
                    _ if status.is_upgraded => (OK, "upgraded"),
                    (true, _) => (UNAVAILABLE, "stopping"),
                    (false, false) => (UNAVAILABLE, "not ready"),
                    (false, true) => (OK, "ready"),
                };
                (line, TEXT, format!("{state}\n"))
            }
        }
    }
}

impl Rejection {
    /// Returns the status line without the version.
    fn line(self) -> &'static str {
        match self {
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::TooLarge => "431 Request Header Fields Too Large",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::status;
    use super::*;

    fn answer(request: &str, status: Status) -> String {
        let request = parse(request.as_bytes()).unwrap();
        String::from_utf8(request.answer(|| status)).unwrap()
    }

    fn get(path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
    }

    #[test]
    fn request_is_incomplete_until_its_headers_end() {
        let request = get("/health");
        for length in 0..request.len() {
            assert_eq!(parse(&request.as_bytes()[..length]), None, "{length}");
        }
        let expected = Some(Request {
            is_head: false,
            resource: Ok(Resource::Health),
        });
        assert_eq!(parse(request.as_bytes()), expected);
        assert_eq!(parse(b"GET /health HTTP/1.0\n\n"), expected);
        let pipelined = request.clone() + "\0 garbage\r\n\r\n" + &request;
        assert_eq!(parse(pipelined.as_bytes()), expected);
    }

    #[test]
    fn paths_select_the_format_and_queries_are_ignored() {
        for (path, resource) in [
            ("/metrics", Ok(Resource::Metrics)),
            ("/metrics?name=x", Ok(Resource::Metrics)),
            ("/health", Ok(Resource::Health)),
            ("/status", Ok(Resource::Text)),
            ("/status.json", Ok(Resource::Json)),
            ("/", Err(Rejection::NotFound)),
            ("/status/", Err(Rejection::NotFound)),
            ("/%68ealth", Err(Rejection::NotFound)),
        ] {
            let request = parse(get(path).as_bytes()).unwrap();
            assert_eq!(request.resource, resource, "{path}");
        }
    }

    #[test]
    fn requests_that_are_not_http_1_are_rejected() {
        for line in [
            "",
            "GET",
            "GET /health",
            "GET /health HTTP/2.0",
            "PRI * HTTP/2.0",
            "GET  /health HTTP/1.1",
            "GET /health HTTP/1.1 more",
            " /health HTTP/1.1",
            "GET http://localhost/health HTTP/1.1",
            "\u{16}\u{3}\u{1}",
        ] {
            let request = parse(format!("{line}\r\n\r\n").as_bytes()).unwrap();
            assert_eq!(request.resource, Err(Rejection::BadRequest), "{line:?}");
        }
        let request = parse(b"POST /health HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(request.resource, Err(Rejection::MethodNotAllowed));
        let request = parse(b"POST /nowhere HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(request.resource, Err(Rejection::NotFound));
    }

    #[test]
    fn request_beyond_the_limit_is_rejected() {
        let head = "GET /health HTTP/1.1\r\nCookie: ";
        let largest = format!("{head}{:x<1$}\r\n\r\n", "", MAX_REQUEST - head.len() - 4);
        assert_eq!(largest.len(), MAX_REQUEST);
        assert_eq!(
            parse(largest.as_bytes()).unwrap().resource,
            Ok(Resource::Health)
        );
        assert_eq!(parse(&largest.as_bytes()[..MAX_REQUEST - 1]), None);
        let larger = largest.replace("Cookie", "Cookies");
        let rejected = parse(larger.as_bytes()).unwrap();
        assert_eq!(rejected.resource, Err(Rejection::TooLarge));
    }

    #[test]
    fn answers_have_a_length_and_close_the_connection() {
        let text = answer(&get("/status"), status());
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert_eq!(body, status().to_string());
        let length = format!("Content-Length: {}", body.len());
        let lines: Vec<_> = head.split("\r\n").collect();
        assert_eq!(lines[0], "HTTP/1.0 200 OK");
        assert!(lines.contains(&length.as_str()) && lines.contains(&"Connection: close"));

        let head_only = answer(&get("/status").replace("GET", "HEAD"), status());
        assert_eq!(head_only, format!("{head}\r\n\r\n"));
        let post = answer(&get("/status").replace("GET", "POST"), status());
        assert!(post.contains("\r\nAllow: GET, HEAD\r\n"), "{post}");
        let missing = answer(&get("/x").replace("GET", "HEAD"), status());
        assert!(missing.starts_with("HTTP/1.0 404 ") && missing.ends_with("\r\n\r\n"));
    }

    #[test]
    fn health_depends_on_the_quorum_and_on_the_stop() {
        let (ok, unavailable) = (
            "HTTP/1.0 200 OK\r\n",
            "HTTP/1.0 503 Service Unavailable\r\n",
        );
        for (is_ready, is_stopping, is_upgraded, line, body) in [
            (true, false, false, ok, "\r\n\r\nready\n"),
            (false, false, false, unavailable, "\r\n\r\nnot ready\n"),
            (false, true, false, unavailable, "\r\n\r\nstopping\n"),
            (false, true, true, ok, "\r\n\r\nupgraded\n"),
        ] {
            let status = Status {
                is_ready,
                is_stopping,
                is_upgraded,
                ..status()
            };
            let answer = answer(&get("/health"), status);
            assert!(
                answer.starts_with(line) && answer.ends_with(body),
                "{answer}"
            );
        }
    }
}

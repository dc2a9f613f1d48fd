"""Sends the same answer as the other measured servers, with gunicorn."""


def app(_environ, start_response):
    start_response("200 OK", [("Content-Length", "12")])
    return [b"hello world\n"]

//! Runs the example `codecs`.

#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn codecs_prints_both_formats_and_an_error() {
    let own = std::env::current_exe().unwrap();
    let built = own.ancestors().nth(2).unwrap();
    let output = Command::new(built.join("examples/codecs"))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            r#"16 bytes: Report { requests: 300, busiest: Some("/index.html") }"#,
            r#"41 bytes: Report { requests: 300, busiest: Some("/index.html") }"#,
            "worker 1 sent nonsense: an empty message, or one of an unknown kind",
        ]
    );
    assert!(output.status.success());
}

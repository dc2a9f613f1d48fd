//! The command line of the examples. `--help` prints the header of an example's source, the first lines
//! with `//!`.

use std::process::exit;

use cluster::LogWriter;
use lexopt::prelude::*;

/// Returns the header of a source file. Only the header becomes part of the program.
macro_rules! header {
    ($file:literal) => {{
        const SOURCE: &str = include_str!($file);
        const LENGTH: usize = usage::header_length(SOURCE.as_bytes());
        // A copy, because a reference would keep the whole file in the program.
        const HEADER: [u8; LENGTH] = *SOURCE.as_bytes().first_chunk().unwrap();
        std::str::from_utf8(&HEADER).unwrap()
    }};
}
pub(crate) use header;

pub(crate) const fn header_length(source: &[u8]) -> usize {
    let mut length = 0;
    while let [b'/', b'/', b'!', ..] = source.split_at(length).1 {
        while source[length] != b'\n' {
            length += 1;
        }
        length += 1;
    }
    length
}

/// Returns the positional arguments, or the default of each argument that is missing. If there are
/// options or more arguments, ends the process as `or_exit` does.
#[allow(dead_code, reason = "examples with options do not call it")]
pub(crate) fn arguments<const N: usize>(source: &str, defaults: [&str; N]) -> [String; N] {
    let mut values = defaults.map(str::to_owned);
    or_exit(source, fill(&mut values));
    values
}

fn fill(values: &mut [String]) -> Result<(), lexopt::Error> {
    let mut args = lexopt::Parser::from_env();
    let mut values = values.iter_mut();
    while let Some(arg) = args.next()? {
        match (arg, values.next()) {
            (Value(given), Some(value)) => *value = given.string()?,
            (unexpected, _) => return Err(unexpected.unexpected()),
        }
    }
    Ok(())
}

/// Returns the parsed options, or ends the process if parsing has failed.
///
/// No example parses `--help` and `-h`, so these options arrive here as errors. For them, prints
/// the usage to standard output, and exits with status 0. For any other error, prints the error and
/// the usage to standard error, and exits with status 2.
pub(crate) fn or_exit<T>(source: &str, parsed: Result<T, lexopt::Error>) -> T {
    let usage = || {
        let lines = source.lines().map_while(|line| line.strip_prefix("//!"));
        let lines: Vec<_> = lines
            .map(|line| line.strip_prefix(' ').unwrap_or(line))
            .collect();
        lines.join("\n")
    };
    match parsed {
        Ok(options) => options,
        Err(lexopt::Error::UnexpectedOption(option)) if option == "--help" || option == "-h" => {
            LogWriter::stdout().line(usage());
            exit(0)
        }
        Err(error) => {
            LogWriter::stderr().line(format_args!("{error}\n\n{}", usage()));
            exit(2)
        }
    }
}

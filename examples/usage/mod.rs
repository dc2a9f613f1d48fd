//! The command line of the examples. `--help` prints the first lines of an example's source.

use std::process::exit;

use cluster::LogWriter;
use lexopt::prelude::*;

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

//! Tests that the pages of the guide agree with the code.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use cluster::pool::PoolOptions;
use libtest_mimic::{Failed, Trial};

use crate::deploying::{FILES, file};
use crate::harness::SOURCES;

/// Returns the names and contents of pages of the guide.
macro_rules! pages {
    ($($name:literal)*) => {
        [$(($name, include_str!(concat!("../../src/guide/", $name, ".md")))),*]
    };
}

const PAGES: [(&str, &str); 15] = pages! {
    "index" "quick_start" "how_it_works" "writing_workers" "servers" "pools" "deploying" "devices"
    "operating" "from_node" "guarantees" "costs" "limits" "design" "glossary"
};

const FRAME: &str = include_str!("../../src/wire/frame/mod.rs");

const README: &str = include_str!("../../README.md");

pub fn trials() -> Vec<Trial> {
    let test = |name: &str, run: fn() -> Result<(), Failed>| Trial::test(name, run);
    vec![
        test("guide_shows_its_files", shown_files),
        test("guide_shows_the_wire_format_of_the_code", wire_format),
        test("guide_shows_the_default_of_each_pool_option", defaults),
        SOURCES.of(test("guide_shows_the_constants_of_the_code", constants)),
        SOURCES.of(test("guide_names_the_versions_of_its_crates", versions)),
        SOURCES.of(test("guide_states_the_lengths_of_examples", lengths)),
        test("readme_shows_figures_of_the_guide", figures),
    ]
}

/// Returns the test that compares the names of tests in the guide and the README with `names`, the
/// names of all trials.
pub fn names_trial(names: BTreeSet<String>) -> Trial {
    SOURCES.of(Trial::test("guide_names_existing_tests", move || {
        named_tests(&names)
    }))
}

pub fn page(name: &str) -> &'static str {
    let found = PAGES.iter().find(|(other, _)| *other == name);
    found.expect("a page of the guide").1
}

/// Returns the directory `src` of the package.
fn sources() -> Result<PathBuf, Failed> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut roots = package.ancestors();
    let root = roots.find(|root| root.join("src/wire/frame/mod.rs").exists());
    Ok(root.ok_or("no sources")?.join("src"))
}

/// Returns the rows of the table whose first header is `header`.
fn table<'a>(text: &'a str, header: &str) -> Result<Vec<Vec<&'a str>>, Failed> {
    let mut lines = text.lines();
    let first_cell = |line: &'a str| line.strip_prefix('|')?.split('|').next();
    let is_header = |line: &&'a str| first_cell(line).is_some_and(|cell| cell.trim() == header);
    lines.find(is_header).ok_or(header)?;
    let rows = lines.skip(1).map_while(|line| line.strip_prefix("| "));
    let cells = |row: &'a str| row.trim_end_matches(" |").split(" | ").collect();
    Ok(rows.map(cells).collect())
}

/// Checks that the table of options has each option of a pool with its default.
fn defaults() -> Result<(), Failed> {
    let header = "option of [`PoolOptions`](crate::pool::PoolOptions)";
    let rows = table(page("pools"), header)?;
    let rows = rows
        .iter()
        .map(|row| [row[0], row[1]].map(|cell| cell.replace('`', "")));
    let shown: BTreeSet<_> = rows.collect();
    // The output has one line for each field, such as `    startup_timeout: 30s,`.
    let fields = format!("{:#?}", PoolOptions::default());
    let fields = fields
        .lines()
        .filter_map(|line| line.trim_end_matches(',').split_once(": "));
    let options = fields.map(|(name, value)| {
        let value = match (name.trim(), value) {
            ("workers", value) => {
                assert_eq!(value, cluster::available_parallelism().to_string());
                "[available_parallelism](crate::available_parallelism())".to_owned()
            }
            ("quorum", "None") => "more than half of the slots".to_owned(),
            ("jitter", value) => format!("{value} %"),
            (_, "None") => "none".to_owned(),
            (_, "0ns") => "0".to_owned(),
            (_, time) if time.ends_with('s') => {
                let unit = time.find(|c: char| !c.is_ascii_digit()).unwrap_or_default();
                format!("{} {}", &time[..unit], &time[unit..])
            }
            (_, value) => value.to_owned(),
        };
        [name.trim().to_owned(), value]
    });
    assert_eq!(shown, options.collect());
    Ok(())
}

/// A constant of the code, and the row of a table that shows it.
struct Shown {
    page: &'static str,
    table: &'static str,
    /// The begin of the row's first cell.
    row: &'static str,
    source: &'static str,
    constant: &'static str,
}

/// Returns all constants that the guide shows in a table of limits.
fn shown_constants() -> Vec<Shown> {
    let shown = |page, table, row, source, constant| Shown {
        page,
        table,
        row,
        source,
        constant,
    };
    let pools = |row, source, constant| shown("pools", "other clock", row, source, constant);
    let worker = |row, source, constant| shown("writing_workers", "", row, source, constant);
    let finish = |row, source, constant| {
        let table = "limit of a finished connection";
        shown("writing_workers", table, row, source, constant)
    };
    vec![
        pools("another stop signal", "pool/core/stop.rs", "REPEAT_TIME"),
        pools(
            "a client of the status server",
            "pool/status/server.rs",
            "CLIENT_TIMEOUT",
        ),
        pools(
            "a client of the status server",
            "pool/status/server.rs",
            "MAX_CLIENTS",
        ),
        pools(
            "a client of the status server",
            "pool/status/http.rs",
            "MAX_REQUEST",
        ),
        pools("a full queue of systemd", "pool/systemd.rs", "RETRY_PAUSE"),
        pools("an orphan is reaped", "master/orphans.rs", "GRACE"),
        pools(
            "idle time of a parked connection",
            "types/endpoint.rs",
            "IDLE_SECONDS",
        ),
        pools("a SYN filter", "core/master/drain.rs", "DRAIN_GRACE"),
        worker(
            "idle time of a parked connection",
            "types/endpoint.rs",
            "IDLE_SECONDS",
        ),
        worker("`finish`", "worker/finish.rs", "FIRST_WAIT"),
        worker(
            "`finish`",
            "core/worker/parked/lingering.rs",
            "LINGER_TIMEOUT",
        ),
        worker("`finish`", "worker/finish.rs", "DISCARD_MAX"),
        worker(
            "pause after a failed `accept`",
            "worker/event_loop.rs",
            "ACCEPT_RETRY",
        ),
        worker(
            "pause after a failed `accept`",
            "core/master/accept.rs",
            "RETRY_DELAY",
        ),
        worker("backlog", "types/endpoint.rs", "BACKLOG"),
        worker(
            "listeners and UDP sockets",
            "core/master/listen.rs",
            "LISTENERS_PER_WORKER_MAX",
        ),
        worker(
            "time for which a dropped",
            "worker/shell/mod.rs",
            "SHUTDOWN_FLUSH",
        ),
        finish(
            "time since the call",
            "core/worker/parked/lingering.rs",
            "LINGER_TIMEOUT",
        ),
        finish("discarded bytes", "worker/finish.rs", "DISCARD_MAX"),
    ]
}

/// Checks that the tables show the values of the constants, and the time for an upgrade.
fn constants() -> Result<(), Failed> {
    for shown in shown_constants() {
        let Shown {
            source, constant, ..
        } = shown;
        let value = constant_of(&fs::read_to_string(sources()?.join(source))?, constant)?;
        let row = row_of(shown.page, shown.table, shown.row)?;
        let is_whole = |(at, _): (usize, &str)| !row[..at].ends_with(|c: char| c.is_ascii_digit());
        assert!(
            row.match_indices(&value).any(is_whole),
            "{constant} is {value}: {row}"
        );
    }
    let options = PoolOptions::default();
    let upgrade = options.get_startup_timeout() + 2 * options.get_min_ready_time();
    let row = row_of("pools", "other clock", "an upgrade must succeed")?;
    assert!(row.contains(&format!("({} s)", upgrade.as_secs())), "{row}");
    Ok(())
}

/// Returns the row that starts with `row`. An empty `header` stands for the last table of the page.
pub fn row_of(name: &str, header: &str, row: &str) -> Result<String, Failed> {
    let text = page(name);
    let text = match header {
        "" => &text[text.rfind("\n| |").ok_or(name)?..],
        _ => text,
    };
    let rows = table(text, header)?;
    let found = rows.iter().find(|cells| cells[0].starts_with(row));
    Ok(found.ok_or(row)?.join(" | "))
}

/// Returns the value of a constant as the guide writes it, with its unit if the code has one.
fn constant_of(source: &str, name: &str) -> Result<String, Failed> {
    let (_, rest) = source.split_once(&format!("const {name}: ")).ok_or(name)?;
    let (_, rest) = rest.split_once(" = ").ok_or(name)?;
    let (value, _) = rest.split_once(';').ok_or(name)?;
    let number: String = value.chars().filter(char::is_ascii_digit).collect();
    let number = |unit: &str| number.strip_suffix(unit).unwrap_or(&number).to_owned();
    Ok(match value {
        _ if value.contains("from_secs(") => number("") + " s",
        _ if value.contains("from_millis(") => number("") + " ms",
        _ if value.ends_with(" << 20") => number("20") + " MiB",
        _ if value.ends_with(" * 1024") => number("1024") + " KiB",
        _ => number(""),
    })
}

/// Checks the versions in the table of crates against `Cargo.lock`.
fn versions() -> Result<(), Failed> {
    let lock = fs::read_to_string(sources()?.join("../Cargo.lock"))?;
    let rows = table(page("servers"), "crate, example")?;
    for row in &rows {
        let mut words = row[0].split([' ', ',', ':']);
        let [name, version] = [words.next(), words.next()].map(Option::unwrap_or_default);
        let package = format!("name = \"{name}\"\nversion = \"{version}\"\n");
        assert!(lock.contains(&package), "{name} {version}");
    }
    Ok(())
}

/// Checks that examples have at most as many lines of code as the guide says.
fn lengths() -> Result<(), Failed> {
    let examples = sources()?.join("../examples");
    let stated = [
        ("pool", "quick_start", "server in {} lines"),
        ("watchdog", "devices", "does this in {} lines"),
    ];
    let stated = stated.map(|(name, page, text)| (name.to_owned(), page, text));
    let servers = table(page("servers"), "crate, example")?;
    let servers = servers.iter().map(|row| {
        let name = row[0].split('`').nth(1).unwrap_or_default();
        let text = "a server of at most {} lines";
        (format!("servers/{name}"), "servers", text)
    });
    for (name, page_name, text) in stated.into_iter().chain(servers) {
        let code = fs::read_to_string(examples.join(format!("{name}.rs")))?;
        let is_code = |line: &&str| !line.trim().is_empty() && !line.trim().starts_with("//");
        let count = code.lines().filter(is_code).count();
        let (before, after) = text.split_once("{}").ok_or(text)?;
        let (_, rest) = page(page_name).split_once(before).ok_or(before)?;
        let limit: usize = rest.split_once(after).ok_or(after)?.0.parse()?;
        assert!(count <= limit, "{name} has {count} lines, not {limit}");
    }
    Ok(())
}

/// Checks that the page `costs` has the multiples and the memory that the README shows.
fn figures() -> Result<(), Failed> {
    let rows = table(README, "figure")?;
    let text: String = rows.iter().flat_map(|row| [row[0], "\n"]).collect();
    let words = || text.split_whitespace();
    let multiples = words().map(|word| word.trim_end_matches([',', ';']));
    let multiples = multiples.filter(|word| word.contains('.') && word.parse::<f64>().is_ok());
    let sizes = words()
        .zip(words().skip(1))
        .filter(|(_, unit)| *unit == "KiB");
    let sizes = sizes.map(|(size, _)| format!("{size} KiB"));
    let figures: Vec<_> = multiples.map(str::to_owned).chain(sizes).collect();
    assert!(figures.len() > 5, "{figures:?}");
    for figure in figures {
        assert!(page("costs").contains(&figure), "{figure}");
    }
    Ok(())
}

/// Checks that the guide shows each file exactly as it is, and no other file.
fn shown_files() -> Result<(), Failed> {
    const PREFIX: &str = "`src/guide/files/";
    let mut shown = BTreeSet::new();
    for (page, text) in PAGES {
        for (index, _) in text.match_indices(PREFIX) {
            let rest = &text[index + PREFIX.len()..];
            let (name, rest) = rest.split_once('`').ok_or(page)?;
            // Skip names that no block follows. Only a line with a name and then a block shows a
            // file.
            let Some((line, rest)) = rest.split_once("\n\n```") else {
                continue;
            };
            if line.contains('\n') {
                continue;
            }
            let (_, block) = rest.split_once('\n').ok_or(name)?;
            let (block, _) = block.split_once("```\n").ok_or(name)?;
            assert_eq!(block, file(name), "{name} in {page}");
            shown.insert(name);
        }
    }
    let all: BTreeSet<_> = FILES.iter().map(|(name, _)| *name).collect();
    assert_eq!(shown, all);
    Ok(())
}

/// Checks that the page `design` has the tables in the header of `src/wire/frame/mod.rs`.
fn wire_format() -> Result<(), Failed> {
    let lines = FRAME.lines().map_while(|line| line.strip_prefix("//!"));
    let lines = lines.map(|line| line.strip_prefix(' ').unwrap_or(line));
    let documentation: String = lines.flat_map(|line| [line, "\n"]).collect();
    let tables: Vec<_> = documentation.split("```text\n").skip(1).collect();
    assert_eq!(tables.len(), 2);
    for table in tables {
        let (table, _) = table.split_once("```").ok_or("the end of a table")?;
        assert!(page("design").contains(table), "{table}");
    }
    Ok(())
}

/// Prefixes of names in the guide that look like names of tests but are not.
const OTHER_NAMES: [&str; 2] = ["cluster_", "exp_backoff_"];

/// Checks that each name of a test in the guide is the name of a trial or of a unit test. Text in
/// backquotes is such a name if it consists of at least four words. A name that ends with `_…` is a
/// prefix of other names. Also checks that each command and each row of the README's table selects
/// a test.
fn named_tests(trials: &BTreeSet<String>) -> Result<(), Failed> {
    let sources = rust_files(&sources()?)?;
    let is_name = |name: &&str| {
        let is_word = |word: &str| {
            let mut bytes = word.bytes();
            !word.is_empty() && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        };
        let words = || name.strip_suffix("_…").unwrap_or(name).split('_');
        let is_other = OTHER_NAMES.iter().any(|other| name.starts_with(other));
        words().count() >= 4 && words().all(is_word) && !is_other
    };
    let exists = |name: &str| match name.strip_suffix('…') {
        Some(prefix) => trials.iter().any(|trial| trial.starts_with(prefix)),
        None => trials.contains(name) || sources.contains(&format!("fn {name}(")),
    };
    let code = PAGES
        .iter()
        .flat_map(|(_, text)| text.split('`').skip(1).step_by(2));
    let names: Vec<_> = code.filter(is_name).collect();
    assert!(names.len() > 100, "{} names", names.len());
    let unknown: Vec<_> = names.iter().filter(|name| !exists(name)).collect();
    assert!(unknown.is_empty(), "no tests with these names: {unknown:?}");

    let rows = table(README, "promise")?;
    let rows = rows.iter().map(|row| row[1].trim_matches('`').to_owned());
    let commands = PAGES.iter().map(|(_, text)| *text).chain([README]);
    let filters: Vec<_> = commands.flat_map(test_filters).chain(rows).collect();
    assert!(filters.len() > 15, "{filters:?}");
    let selects = |filter: &String| {
        let is_part = |trial: &String| trial.contains(filter);
        trials.iter().any(is_part) || sources.contains(&format!("fn {filter}"))
    };
    let vain: Vec<_> = filters.iter().filter(|filter| !selects(filter)).collect();
    assert!(vain.is_empty(), "no tests for these filters: {vain:?}");
    Ok(())
}

/// Returns the names that the commands `cargo test` in `text` select, except those for a package of
/// its own, and except `NAME`, which stands for a name.
fn test_filters(text: &str) -> Vec<String> {
    let of_command = |command: &str| {
        let command = command.split(['`', '\n']).next()?;
        let command = command.split_once(" -- ").map_or(command, |(own, _)| own);
        let command = command.split_once(" # ").map_or(command, |(own, _)| own);
        let command = command
            .replace("--test process", "")
            .replace("--test soak", "");
        let filter = command.split_whitespace().last()?;
        let is_filter = !filter.starts_with('-') && filter != "NAME" && !command.contains(" -p ");
        is_filter.then(|| filter.to_owned())
    };
    text.split("cargo test")
        .skip(1)
        .filter_map(of_command)
        .collect()
}

/// Returns all Rust files of a directory as one text.
fn rust_files(directory: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            text += &rust_files(&path)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text += &fs::read_to_string(path)?;
        }
    }
    Ok(text)
}

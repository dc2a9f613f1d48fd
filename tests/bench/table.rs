//! The table of results. It is printed as text and written as JSON.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

/// A summary of the values of all rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl From<Vec<f64>> for Figure {
    fn from(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => f64::midpoint(values[middle - 1], values[middle]),
            _ => values[middle],
        };
        Self {
            median,
            min: values[0],
            max: values[values.len() - 1],
        }
    }
}

impl Figure {
    pub fn in_unit(&self, unit: &str) -> String {
        let Self { median, min, max } = self;
        let text = match min < max {
            true => format!(
                "{} {unit} ({}–{})",
                number(*median),
                number(*min),
                number(*max)
            ),
            false => format!("{} {unit}", number(*median)),
        };
        text.replace("  ", " ")
    }
}

impl From<f64> for Figure {
    fn from(value: f64) -> Self {
        vec![value].into()
    }
}

/// Returns the ratio of `own` to `other` in each round.
pub fn ratios(own: &[f64], other: &[f64]) -> Vec<f64> {
    own.iter()
        .zip(other)
        .map(|(own, other)| own / other)
        .collect()
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

impl Goal {
    /// Returns whether the value meets the goal. The comparison uses the printed value, rounded to
    /// two decimals.
    fn is_met(self, value: f64) -> bool {
        let value = (value * 100.0).round() / 100.0;
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

#[derive(Debug, Serialize)]
pub struct Row {
    part: String,
    name: String,
    figure: Option<Figure>,
    unit: String,
    goal: Option<Goal>,
    met: Option<bool>,
    note: String,
}

/// A point of a curve. Points are only in the JSON, for plots.
#[derive(Debug, Serialize)]
struct Point {
    part: String,
    curve: String,
    x: f64,
    figure: Figure,
}

#[derive(Debug, Default, Serialize)]
pub struct Table {
    #[serde(skip)]
    part: String,
    rows: Vec<Row>,
    points: Vec<Point>,
    notes: Vec<String>,
}

impl Table {
    pub fn begin(&mut self, part: &str) {
        eprintln!("{part}");
        self.part = part.to_owned();
    }

    pub fn row(&mut self, name: &str, figure: impl Into<Figure>, unit: &str) -> &mut Row {
        let row = self.add(name, Some(figure.into()));
        unit.clone_into(&mut row.unit);
        row
    }

    pub fn skip(&mut self, name: &str, why: &str) {
        self.add(name, None).note(&format!("skipped: {why}"));
    }

    /// Adds a point to a curve of this part.
    pub fn point(&mut self, curve: &str, x: f64, figure: impl Into<Figure>) {
        self.points.push(Point {
            part: self.part.clone(),
            curve: curve.to_owned(),
            x,
            figure: figure.into(),
        });
    }

    /// Adds a line below the table.
    pub fn note(&mut self, note: &str) {
        self.notes.push(note.to_owned());
    }

    fn add(&mut self, name: &str, figure: Option<Figure>) -> &mut Row {
        self.rows.push(Row {
            part: self.part.clone(),
            name: name.to_owned(),
            figure,
            unit: String::new(),
            goal: None,
            met: None,
            note: String::new(),
        });
        self.rows.last_mut().unwrap()
    }

    pub fn end(&self) {
        let rows: Vec<_> = self.rows.iter().map(Row::cells).collect();
        let head = ["part", "measurement", "figure", "goal", "", "details"].map(str::to_owned);
        let mut widths = head.each_ref().map(|cell| cell.chars().count());
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        let rule = widths.map(|width| "-".repeat(width));
        for row in [head, rule].iter().chain(&rows) {
            for (cell, width) in row.iter().zip(widths) {
                let _ = write!(text, "| {cell:width$} ");
            }
            text.push_str("|\n");
        }
        print!("\n{text}\n");
        for note in &self.notes {
            println!("{note}");
        }
        let json = serde_json::to_vec_pretty(self).unwrap();
        std::fs::write(
            Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench.json"),
            json,
        )
        .unwrap();
    }
}

impl Row {
    pub fn goal(&mut self, goal: Goal) -> &mut Self {
        self.met = self
            .figure
            .as_ref()
            .map(|figure| goal.is_met(figure.median));
        self.goal = Some(goal);
        self
    }

    pub fn note(&mut self, note: &str) -> &mut Self {
        note.clone_into(&mut self.note);
        self
    }

    fn cells(&self) -> [String; 6] {
        let goal = self.goal.map_or_else(String::new, |goal| match goal {
            Goal::AtMost(limit) => format!("≤ {}", number(limit)),
            Goal::AtLeast(limit) => format!("≥ {}", number(limit)),
        });
        let met = match self.met {
            Some(true) => "met",
            Some(false) => "missed",
            None => "",
        };
        let figure = self.figure.as_ref();
        let figure = figure.map_or_else(String::new, |figure| figure.in_unit(&self.unit));
        [&self.part, &self.name, &figure, &goal, met, &self.note].map(str::to_owned)
    }
}

/// Formats a number with two decimals below 10, one below 100, and none for larger or whole
/// numbers.
pub fn number(value: f64) -> String {
    match value.abs() {
        ..10.0 if value.fract() != 0.0 => format!("{value:.2}"),
        ..100.0 if value.fract() != 0.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

//! A table of numbers with a name for each row, columns aligned on the right.

use std::fmt;

/// Width of the names.
const NAMES: usize = 14;

/// The table.
pub struct Sheet {
    head: Vec<String>,
    rows: Vec<(String, Vec<String>)>,
}

impl Sheet {
    /// An empty table with these columns.
    pub fn new(head: &[&str]) -> Sheet {
        Sheet { head: head.iter().map(|h| h.to_string()).collect(), rows: Vec::new() }
    }

    /// Adds a row of as many cells as there are columns.
    pub fn row(&mut self, name: &str, cells: Vec<String>) {
        self.rows.push((name.to_string(), cells));
    }
}

impl fmt::Display for Sheet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = (String::new(), self.head.clone());
        for (name, cells) in std::iter::once(&head).chain(&self.rows) {
            write!(f, "{name:<NAMES$}")?;
            for (cell, title) in cells.iter().zip(&self.head) {
                let width = 10.max(title.chars().count() + 3);
                write!(f, "{cell:>width$}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_below_their_titles() {
        let mut sheet = Sheet::new(&["Fréchet", "right class"]);
        sheet.row("samples", vec!["5.31".into(), "88.4 %".into()]);
        let text = sheet.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines, ["                 Fréchet   right class", "samples             5.31        88.4 %"]);
    }
}

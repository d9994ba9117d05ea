//! Which tokens a depthwise convolution reads: a window over a grid of tokens, of which a sequence is one row.

use std::ops::Range;

/// Sizes of the grid and of the window, and how many rows and columns of the window come before the current token.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Rows and columns of tokens.
    pub grid: [usize; 2],
    /// Rows and columns of taps.
    pub size: [usize; 2],
    /// Rows and columns of taps before the current token.
    pub lead: [usize; 2],
}

/// Row and column of a token.
pub type Place = [usize; 2];

impl Window {
    /// A window along a sequence of `n` tokens.
    pub fn line(n: usize, taps: usize, lead: usize) -> Self {
        Window { grid: [1, n], size: [1, taps], lead: [0, lead] }
    }

    /// Taps.
    pub fn taps(&self) -> usize {
        self.size[0] * self.size[1]
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.grid[0] * self.grid[1]
    }

    /// The window seen from the other end of the token order.
    pub fn turned(self) -> Self {
        Window { lead: [self.size[0] - 1 - self.lead[0], self.size[1] - 1 - self.lead[1]], ..self }
    }

    /// Most tokens, in token order, between a token and one that it reads: (earlier ones, later ones).
    fn reach(&self) -> (usize, usize) {
        let span = |rows: usize, columns: usize| rows * self.grid[1] + columns;
        let [rows, columns] = self.lead;
        (span(rows, columns), span(self.size[0] - 1 - rows, self.size[1] - 1 - columns))
    }

    /// Tokens at both sides that a block of tokens has to do with besides its own.
    pub fn margin(&self) -> usize {
        let (before, after) = self.reach();
        before + after
    }

    /// Tokens that the convolution of `tokens` reads.
    pub fn sources(&self, tokens: &Range<usize>) -> Range<usize> {
        let (before, after) = self.reach();
        tokens.start.saturating_sub(before)..(tokens.end + after).min(self.tokens())
    }

    /// Tokens whose convolution reads `tokens`.
    pub fn readers(&self, tokens: &Range<usize>) -> Range<usize> {
        let (before, after) = self.reach();
        tokens.start.saturating_sub(after)..(tokens.end + before).min(self.tokens())
    }

    /// Where a token is.
    #[inline(always)]
    pub fn place(&self, token: usize) -> Place {
        if self.grid[0] == 1 { [0, token] } else { [token / self.grid[1], token % self.grid[1]] }
    }

    /// Row and column of tap `j` in the window.
    #[inline(always)]
    fn tap(&self, j: usize) -> [usize; 2] {
        // The usual widths as constants, which spares a division for each tap of each token.
        match self.size {
            [1, _] => [0, j],
            [_, 3] => [j / 3, j % 3],
            [_, 5] => [j / 5, j % 5],
            [_, columns] => [j / columns, j % columns],
        }
    }

    #[inline(always)]
    fn token(&self, row: usize, column: usize, j: usize) -> Option<usize> {
        let inside = row < self.grid[0] && column < self.grid[1] && j < self.taps();
        inside.then(|| row * self.grid[1] + column)
    }

    /// The token that tap `j` of the token at a place reads, where there is one.
    #[inline(always)]
    pub fn source(&self, [row, column]: Place, j: usize) -> Option<usize> {
        let tap = self.tap(j);
        self.token((row + tap[0]).wrapping_sub(self.lead[0]), (column + tap[1]).wrapping_sub(self.lead[1]), j)
    }

    /// The token that reads the token at a place by tap `j`, where there is one.
    #[inline(always)]
    pub fn reader(&self, [row, column]: Place, j: usize) -> Option<usize> {
        let tap = self.tap(j);
        self.token((row + self.lead[0]).wrapping_sub(tap[0]), (column + self.lead[1]).wrapping_sub(tap[1]), j)
    }

    /// The rows of the grid that `tokens` touch: (row, its columns).
    pub fn rows(&self, tokens: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let (columns, tokens) = (self.grid[1], tokens.clone());
        (tokens.start / columns..tokens.end.div_ceil(columns)).map(move |row| {
            let first = row * columns;
            (row, tokens.start.max(first) - first..tokens.end.min(first + columns) - first)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sources, readers and their ranges agree with each other, and a turned window reads what the window is read by.
    #[test]
    fn sources_and_readers_are_inverse() {
        let windows = [
            Window { grid: [4, 5], size: [3, 3], lead: [1, 1] },
            Window { grid: [3, 2], size: [5, 5], lead: [2, 2] },
            Window::line(7, 4, 3),
            Window::line(3, 9, 2),
        ];
        for w in windows {
            let (n, block) = (w.tokens(), 1..w.tokens().min(3));
            for (t, s, j) in (0..n).flat_map(|t| (0..n).flat_map(move |s| (0..w.taps()).map(move |j| (t, s, j)))) {
                let reads = w.source(w.place(t), j) == Some(s);
                assert_eq!(w.reader(w.place(s), j) == Some(t), reads, "{w:?} {t} {s} {j}");
                assert_eq!(w.turned().source(w.place(s), w.taps() - 1 - j) == Some(t), reads, "{w:?} {t} {s} {j}");
                assert!(!reads || !block.contains(&t) || w.sources(&block).contains(&s));
                assert!(!reads || !block.contains(&s) || w.readers(&block).contains(&t));
            }
            let tokens: Vec<usize> = w.rows(&block).flat_map(|(y, xs)| xs.map(move |x| y * w.grid[1] + x)).collect();
            assert_eq!(tokens, block.collect::<Vec<_>>());
        }
    }
}

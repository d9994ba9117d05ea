//! Fixed 2-D sine–cosine positions of tokens on a grid.

/// The table `[N, D]` of a grid with the given coordinates of its rows and columns: the first half of a token's row
/// encodes the column, the second the row, each as [sin | cos] over frequencies 10000^(−4i/D).
pub(super) fn table(rows: &[f64], columns: &[f64], width: usize) -> Vec<f32> {
    let quarter = width / 4;
    let waves = |position: &f64| -> Vec<f32> {
        let angle = |i: usize| position * 10_000f64.powf(-(i as f64) / quarter as f64);
        let sines = (0..quarter).map(|i| angle(i).sin() as f32);
        sines.chain((0..quarter).map(|i| angle(i).cos() as f32)).collect()
    };
    let (rows, columns): (Vec<Vec<f32>>, Vec<Vec<f32>>) =
        (rows.iter().map(waves).collect(), columns.iter().map(waves).collect());
    let mut table = Vec::with_capacity(rows.len() * columns.len() * width);
    for row in &rows {
        for column in &columns {
            table.extend_from_slice(column);
            table.extend_from_slice(row);
        }
    }
    table
}

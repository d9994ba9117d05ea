//! What a user should know although nothing failed: a damaged cache entry, an archive that does not fit.
//!
//! The backend cannot print. It leaves a line here, each text once a process, and the command line shows it.

use std::sync::{Mutex, PoisonError};

/// Lines to show, and how many were shown.
static NOTICES: Mutex<(Vec<String>, usize)> = Mutex::new((Vec::new(), 0));

/// Leaves a line, unless it was left before.
pub(super) fn leave(text: String) {
    let mut notices = NOTICES.lock().unwrap_or_else(PoisonError::into_inner);
    if !notices.0.contains(&text) {
        notices.0.push(text);
    }
}

/// The lines left since the last call.
pub fn take() -> Vec<String> {
    let mut notices = NOTICES.lock().unwrap_or_else(PoisonError::into_inner);
    let new = notices.0[notices.1..].to_vec();
    notices.1 = notices.0.len();
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_shown_once() {
        leave("the test's notice".to_string());
        leave("the test's notice".to_string());
        let ours = |lines: Vec<String>| lines.iter().filter(|l| *l == "the test's notice").count();
        assert_eq!(ours(take()), 1);
        leave("the test's notice".to_string());
        assert_eq!(ours(take()), 0);
    }
}

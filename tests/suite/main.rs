//! The test suites.

mod fuzz;
mod golden_io;
<<<<<<< HEAD
mod properties;
=======
mod graft;
>>>>>>> graft

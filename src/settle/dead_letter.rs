//! Dead letters (placeholder until its branch lands).

"""Named arrays in every form, and which slice of a parameter a rank holds."""

"""A rule check, a reward and a task of one's own. docs/extending.md says what each of them gets and returns."""

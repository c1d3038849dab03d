"""Random cases in numbers; a few of them in every test run."""

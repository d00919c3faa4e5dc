"""The sections of the pages that are written from rows of benchmarks: a module for each page."""

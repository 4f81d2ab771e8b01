"""Reports of runs: tables, HTML pages, comparisons."""

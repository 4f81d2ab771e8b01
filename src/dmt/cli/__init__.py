"""The command line: `dmt distill | consolidate | sleep | memory | generate | compare | config`."""

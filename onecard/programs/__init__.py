"""One file per sub-command: it parses the options and connects the rooms. No other room imports it."""

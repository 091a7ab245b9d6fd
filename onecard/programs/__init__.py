"""One file a sub-command: parse the options, then hand rooms to each other; nobody imports it."""

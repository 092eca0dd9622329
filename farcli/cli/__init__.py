"""The command line: one file a subcommand, each parses, calls a verb and renders; nothing heavy at import."""

"""What farcli does: one public function each, the Python interface behind the subcommands."""

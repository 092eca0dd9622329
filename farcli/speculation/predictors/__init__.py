"""One predictor a file; the table is `farcli.speculation.table`."""

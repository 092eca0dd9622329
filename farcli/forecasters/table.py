"""The methods there are, by name. Strings, so that listing them imports nothing."""

FORECASTERS = {
    "persistence": "farcli.forecasters.persistence:Persistence",
    "mean": "farcli.forecasters.mean:Mean",
    "linear": "farcli.forecasters.linear:Linear",
    "quadratic": "farcli.forecasters.quadratic:Quadratic",
    "lsq-line": "farcli.forecasters.lsq_line:LsqLine",
    "lfd2": "farcli.forecasters.lfd2:Lfd2",
}

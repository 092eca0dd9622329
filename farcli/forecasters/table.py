"""The methods there are, by name. Strings, so that listing them imports nothing."""

FORECASTERS = {
    "persistence": "farcli.forecasters.persistence:Persistence",
    "mean": "farcli.forecasters.mean:Mean",
    "drift": "farcli.forecasters.mean:Drift",
    "linear": "farcli.forecasters.linear:Linear",
    "quadratic": "farcli.forecasters.quadratic:Quadratic",
    "lsq-line": "farcli.forecasters.lsq_line:LsqLine",
    "lfd2": "farcli.forecasters.lfd2:Lfd2",
    "far": "farcli.forecasters.far:Far",
    "loss-lfd": "farcli.forecasters.loss_lfd:LossLfd",
    "aitken": "farcli.forecasters.aitken:Aitken",
    "dmd": "farcli.forecasters.dmd:Dmd",
    "ema": "farcli.forecasters.ema:Ema",
    "lawa": "farcli.forecasters.lawa:Lawa",
    "gfm": "farcli.forecasters.gfm:Gfm",
    "introspection": "farcli.forecasters.introspection:Introspection",
    "wnn": "farcli.forecasters.wnn:Wnn",
    "dlinear": "farcli.forecasters.dlinear:DLinear",
    "lstm": "farcli.forecasters.lstm:Lstm",
    "transformer": "farcli.forecasters.transformer:Transformer",
    "nino-mlp": "farcli.forecasters.nino_mlp:NinoMlp",
}

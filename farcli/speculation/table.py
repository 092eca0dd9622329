"""The predictors there are, by name. Strings, so that listing them imports nothing.

Any method of `farcli.forecasters.table` that needs no fitting is one too, by its own name.
"""

PREDICTORS = {
    "outer": "farcli.speculation.predictors.outer:Outer",
    "spectral": "farcli.speculation.predictors.spectral:Spectral",
    "shift": "farcli.speculation.predictors.shift:Shift",
    "moments": "farcli.speculation.predictors.moments:MomentsAlong",
    "lookahead": "farcli.speculation.predictors.lookahead:Lookahead",
    "to-average": "farcli.speculation.predictors.to_average:ToAverage",
    "anderson": "farcli.speculation.predictors.anderson:Anderson",
    "merged-line": "farcli.speculation.predictors.merged_line:MergedLine",
    "loss-span": "farcli.speculation.predictors.loss_span:LossSpan",
    "lfd2-online": "farcli.speculation.predictors.lfd2_online:Lfd2Online",
}

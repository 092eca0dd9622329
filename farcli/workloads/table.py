"""The workloads there are, by name. Strings, so that listing them imports nothing."""

WORKLOADS = {
    "digits-cnn": "farcli.workloads.digits_cnn:DigitsCnn",
    "linreg": "farcli.workloads.linreg:Linreg",
    "mlp": "farcli.workloads.mlp:Mlp",
}

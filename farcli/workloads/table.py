"""The workloads there are, by name. Strings, so that listing them imports nothing."""

WORKLOADS = {
    "digits-cnn": "farcli.workloads.digits_cnn:DigitsCnn",
    "distilbert": "farcli.workloads.distilbert:Distilbert",
    "gpt2": "farcli.workloads.gpt2:Gpt2",
    "image-cnn": "farcli.workloads.image_cnn:ImageCnn",
    "image-mlp": "farcli.workloads.image_mlp:ImageMlp",
    "linreg": "farcli.workloads.linreg:Linreg",
    "mlp": "farcli.workloads.mlp:Mlp",
    "nas-cnn": "farcli.workloads.nas_cnn:NasCnn",
    "vit": "farcli.workloads.vit:Vit",
}

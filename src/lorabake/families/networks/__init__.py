"""Networks that families share: U-Net, text encoders, autoencoder; and how their weights are read."""

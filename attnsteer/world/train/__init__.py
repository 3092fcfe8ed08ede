"""Training of the world's models: `python -m attnsteer.world.train {vae,sd3,llava} --help`."""

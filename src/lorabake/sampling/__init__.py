"""Drawing pictures: a loaded model and prompts in, pictures with generation parameters and labelled grids out."""

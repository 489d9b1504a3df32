"""A distributed optimiser as its user sees it; the model's state; parameters as one flat array. torch from here up."""

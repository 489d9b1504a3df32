"""Base classes of distributed optimisers, the model's state, and the flat parameter. torch is imported from here up."""

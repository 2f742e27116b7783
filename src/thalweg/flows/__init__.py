"""A generative field: rewards through samplers, differentiated as the caller chooses."""

from thalweg.flows.pipeline import through

__all__ = ["through"]

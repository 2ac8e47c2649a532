"""Distillation: one student of a teacher or an ensemble, from logits, samples, or both."""

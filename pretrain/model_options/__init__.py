"""Model-side options of a run, each off by default: `options:` in its configuration (docs/model_options.md)."""

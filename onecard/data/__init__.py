"""Files become conversations, token ids and targets, and packed micro-batches; prompt templates."""

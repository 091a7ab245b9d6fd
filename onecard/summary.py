"""What a run says before its first step: what was chosen and why, and three rows as the model sees them."""

import numpy as np

from onecard import adapter, prompt, quantised, rows, weights
from onecard.config import FinetuneConfig
from onecard.journal import say
from onecard.plan import Plan

DEFAULTS = FinetuneConfig()
ADAPTER_OPTIONS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "rslora", "peft_config")


def describe(plan: Plan) -> None:
    """Say what was chosen and why, what happened to the rows, and show three of them."""
    options, lengths, reasons, encoding = plan.options, plan.examples.lengths, plan.reasons, plan.encoding
    say(f"device      {plan.device}: {reasons['device']}")
    say(f"arithmetic  {plan.dtype}: {reasons['arithmetic']}; trained weights and optimizer in fp32")
    if options.train_what in (weights.FULL, adapter.EMBEDDINGS):
        unused = [name for name in ADAPTER_OPTIONS if getattr(options, name) != getattr(DEFAULTS, name)]
        if unused:
            say(f"warning: without LoRA, {', '.join(f'--{name}' for name in unused)} has no effect.")
    say(f"base        {_describe_base(plan)}")
    recompute = "on" if plan.checkpointing else "off"
    say(f"recompute   {recompute} (gradient checkpointing): {reasons['recompute']}")
    used = [source for source in plan.sources if not source.validation]
    if len(plan.sources) > 1:
        more = "".join(f", {s.path.name} x {s.weight:g}" for s in used if s.weight != 1)
        say(f"files       {len(used)} to train on, {len(plan.sources) - len(used)} for validation{more}")
    what = "blocks of raw text" if plan.task == rows.PRETRAIN else "rows"
    say(
        f"{what:<11} {len(plan.train_rows)} to train on, {len(plan.validation_rows)} for validation; "
        f"{int(lengths.sum())} tokens, median {int(np.median(lengths))}, longest {int(lengths.max())}"
    )
    say(
        f"            of {encoding.read} rows {encoding.cut} were cut at {options.cutoff_len} tokens, "
        f"{encoding.dropped} dropped (no target left), {len(encoding.rejected)} rejected"
    )
    if encoding.cut:
        say("            an answer that is cut short has no end token; --long_rows drop leaves such rows out")
    if options.overlap and plan.task != rows.PRETRAIN:
        say("warning: --overlap is for raw text; these rows have none.")
    if plan.overlapping:
        say(f"warning: {plan.overlapping} validation rows are training rows too.")
    say(
        f"steps       {plan.total_steps} of {options.batch_size} rows ({plan.steps_per_epoch} an epoch), "
        f"rate {options.learning_rate:g} {options.lr_scheduler}, warm-up {plan.warmup_steps} steps"
    )
    asked = options.warmup_steps
    if options.warmup_ratio is None and plan.warmup_steps < asked:
        say(f"            a short run: {plan.warmup_steps} warm-up steps, not {asked} (at most a fifth)")
    if options.learning_rate == 0:
        say("warning: --learning_rate is 0, so nothing will be learned.")
    say("\nThree rows as the model sees them; what it learns to say stands between « and »:")
    for row in plan.train_rows[:3]:
        ids, is_target = plan.examples[row]
        say("-" * 60 + "\n" + prompt.show(plan.tokenizer, ids.tolist(), is_target.tolist()))
    say("-" * 60)


def _describe_base(plan: Plan) -> str:
    kind = quantised.method(plan.base_config)
    if kind:
        bits = quantised.bits(plan.base_config)
        return f"{bits} bits by {kind}" if bits else kind
    how = "" if plan.options.bits == 16 else " by bitsandbytes, multiplied by frozen products"
    return f"{plan.options.bits} bits{how}"

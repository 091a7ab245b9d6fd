"""Look at rows before training on them: schema, lengths, what is cut, what looks wrong, what it costs.

python tools/check_data.py --data_path rows.json
python tools/check_data.py --data_path rows.json --html report.html --png lengths.png
python tools/check_data.py --data_path rows.json --clean clean.jsonl --repair
"""

from pathlib import Path

from onecard import config
from onecard.errors import UserError

LESS_MEMORY = ""  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = config.parse(config.CheckConfig, arguments, description=__doc__)
    from onecard import (  # after the options: --help needs no torch
        check,
        hub,
        model,
        reader,
        report,
        template,
    )

    if options.repair and not options.clean:
        raise UserError("--repair mends what --clean writes.", "Add --clean FILE.jsonl.")
    template.check(options.template)
    paths = [source.path for source in reader.sources(options.data_path, fetch=hub.fetch_dataset)]
    tokenizer = model.load_tokenizer(hub.locate(options.model_path))
    form = template.load(options.template, tokenizer)
    how = (options.train_on_inputs, options.train_on)
    found = check.Findings()
    rows = check.examine(found, paths, options.schema, form, tokenizer, options.cutoff_len, *how)
    taken = {path.resolve() for path in paths}
    wanted = [("clean", target) for target in check.outputs(Path(options.clean))] if options.clean else []
    wanted += [(name, Path(getattr(options, name))) for name in ("html", "png") if getattr(options, name)]
    for name, target in wanted:
        if target.resolve() in taken:
            problem = f"--{name}: {target} is the file that is looked at, or written already."
            raise UserError(problem, "Name another file.")
        if not target.absolute().parent.is_dir():
            raise UserError(f"--{name} {target}: its folder does not exist.", "Make it, or name another.")
        taken.add(target.resolve())
    cleaner = check.Cleaner(Path(options.clean), options.repair) if options.clean else None
    check.all_rows(rows, cleaner)
    text = check.report(found, options.cutoff_len)
    print(text)
    if cleaner:
        kept, dropped = cleaner.targets
        print(f"\n{cleaner.kept} rows are in {kept}, {cleaner.left_out} with the reason in {dropped}.")
    if options.png and found.lengths:
        report.lengths(found.lengths, options.cutoff_len, Path(options.png))
        print(f"The histogram is in {options.png}.")
    if options.html:
        check.write_html(found, f"Rows of {options.data_path}", text, Path(options.html))
        print(f"The report is in {options.html}; open it in a browser.")

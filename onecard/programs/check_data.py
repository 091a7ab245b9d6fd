"""Look at rows before training on them: schema, lengths, what is cut, what looks wrong, what it costs.

python tools/check_data.py --data_path rows.json
python tools/check_data.py --data_path rows.json --html report.html --png lengths.png
python tools/check_data.py --data_path rows.json --clean clean.jsonl --repair
"""

from pathlib import Path

from onecard.config import options as config_options
from onecard.config import tools as tool_config
from onecard.errors import UserError

LESS_MEMORY = ""  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = config_options.parse(tool_config.CheckConfig, arguments, description=__doc__)
    from onecard.data import check as data_check
    from onecard.data import reader as data_reader
    from onecard.data import template as templates
    from onecard.hub import locate
    from onecard.models import tokenizer as models_tokenizer

    if options.repair and not options.clean:
        raise UserError("--repair mends what --clean writes.", "Add --clean FILE.jsonl.")
    templates.check(options.template)
    paths = [source.path for source in data_reader.sources(options.data_path, fetch=locate.fetch_dataset)]
    tokenizer = models_tokenizer.load_tokenizer(locate.locate(options.model_path))
    form = templates.load(options.template, tokenizer)
    how = (options.train_on_inputs, options.train_on)
    found = data_check.Findings()
    rows = data_check.examine(found, paths, options.schema, form, tokenizer, options.cutoff_len, *how)
    taken = {path.resolve() for path in paths}
    wanted = (
        [("clean", target) for target in data_check.outputs(Path(options.clean))] if options.clean else []
    )
    wanted += [(name, Path(getattr(options, name))) for name in ("html", "png") if getattr(options, name)]
    for name, target in wanted:
        if target.resolve() in taken:
            problem = f"--{name}: {target} is the file that is looked at, or written already."
            raise UserError(problem, "Name another file.")
        if not target.absolute().parent.is_dir():
            raise UserError(f"--{name} {target}: its folder does not exist.", "Make it, or name another.")
        taken.add(target.resolve())
    cleaner = data_check.Cleaner(Path(options.clean), options.repair) if options.clean else None
    data_check.all_rows(rows, cleaner)
    text = data_check.report(found, options.cutoff_len)
    print(text)
    if cleaner:
        kept, dropped = cleaner.targets
        print(f"\n{cleaner.kept} rows are in {kept}, {cleaner.left_out} with the reason in {dropped}.")
    if options.png and found.lengths:
        data_check.lengths(found.lengths, options.cutoff_len, Path(options.png))
        print(f"The histogram is in {options.png}.")
    if options.html:
        data_check.write_html(found, f"Rows of {options.data_path}", text, Path(options.html))
        print(f"The report is in {options.html}; open it in a browser.")

"""Trains the example for a few steps, looks at its dashboards in a real TensorBoard and a real browser, keeps pictures.

python -m tests.dashboards runs/dashboards
"""

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser

from tests.browser import Dashboard, find_chromium, open_tensorboard, serve, start_chromium

ROOT = Path(__file__).parents[1]
READINGS = ("cross_entropy", "bits_per_token", "perplexity")
BOUNDS = [f"{name}_{end}" for name in ("cross_entropy", "perplexity") for end in ("lower", "upper")]
REFERENCES = ("uniform_bits_per_token", "unigram_bits_per_token")
PICTURES = ("val/by_position", "val/distribution", "val/interval", "val/surprisal")
CURVES = {
    *(f"train/{name}{suffix}" for name in (*READINGS, "num_tokens") for suffix in ("", "_epoch")),
    *(f"val/{name}" for name in (*READINGS, *BOUNDS, *REFERENCES, "best_bits_per_token", "num_tokens")),
    *READINGS,  # The overlays
}


def train(folder: Path) -> None:
    """Train the smoke configuration."""
    configs = [f"--config={ROOT / 'configs' / name}.yaml" for name in ("char_lm", "smoke")]
    where = f"--trainer.logger.init_args.save_dir={folder}"
    command = [sys.executable, str(ROOT / "examples" / "char_lm" / "main.py"), "fit", *configs, where]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"The example failed:\n{done.stderr}")


def look(dashboard: Dashboard, folder: Path) -> list[str]:
    """Open every tab, keep a picture of each, and return what is wrong."""
    wrong: list[str] = []

    def expect(what: str, actual: object, expected: object) -> None:
        print(f"  {'ok   ' if actual == expected else 'WRONG'}  {what}")
        if actual != expected:
            wrong.append(f"{what}: expected {expected}, saw {actual}")

    def keep(name: str) -> None:
        dashboard.screenshot(folder / f"{name}.png")

    cards = [card for group in dashboard.time_series().values() for card in group]
    keep("time_series")
    others = {"epoch", "lr-AdamW/blocks", "lr-AdamW/embedding_and_head"}
    expect("Time Series: every curve", {card.tag for card in cards if card.kind == "scalar"}, CURVES | others)
    expect(
        "Time Series: curves have values", [card.tag for card in cards if card.kind == "scalar" and not card.values], []
    )
    expect(
        "Time Series: pictures",
        {card.tag for card in cards if card.kind == "image" and min(card.size) > 300},
        set(PICTURES),
    )

    scalars = [card for group in dashboard.scalars().values() for card in group]
    keep("scalars")
    expect("Scalars: every curve of ours is described", {card.tag for card in scalars if card.description}, CURVES)

    charts = dashboard.custom_scalars()
    keep("custom_scalars")
    expect("Custom Scalars: one category", list(charts), ["Likelihood"])
    expected = {f"{name}: training, validation": 2 + 2 * (name == "bits_per_token") for name in READINGS}
    expected |= {f"{name}: validation with its interval": 1 for name in ("cross_entropy", "perplexity")}
    expect(
        "Custom Scalars: lines of each chart", {chart.title: chart.lines for chart in charts["Likelihood"]}, expected
    )
    expect(
        "Custom Scalars: no red box, no missing tag",
        [chart.problem for chart in charts["Likelihood"] if chart.problem],
        [],
    )

    trials = dashboard.hparams()
    keep("hparams")
    columns = [f"val/{name}" for name in ("best_bits_per_token", *READINGS)]
    expect("HParams: the run's own tags", [name for name in trials.columns if "/" in name or "hp_" in name], columns)
    expect(
        "HParams: one run, with a value of each",
        [bool(row[name]) for row in trials.rows for name in columns],
        [True] * 4,
    )

    pictures = [picture for group in dashboard.images().values() for picture in group]
    keep("images")
    expect(
        "Images: all pictures, of the last step", [(p.tag, p.step) for p in pictures], [(tag, "39") for tag in PICTURES]
    )

    texts = [text for group in dashboard.text().values() for text in group]
    keep("text")
    expect("Text: a page of three tables", [len(text.tables) for text in texts], [3])
    expect("no error in the browser's console", dashboard.problems, [])
    return wrong


def look_at_page(chromium: Browser, folder: Path) -> list[str]:
    """Open the page of the validation's text beside the event files, keep a picture, and return what is wrong."""
    [path] = folder.glob("smoke/**/val_surprisal_page.html")
    tab = chromium.new_page(viewport={"width": 1000, "height": 700})
    tab.goto(path.resolve().as_uri())
    tab.locator(".text span").nth(60).hover()
    tab.screenshot(path=folder / "surprisal_page.png")
    num_pieces = tab.locator(".text span").count()
    tab.close()
    print(f"  {'ok   ' if num_pieces > 1000 else 'WRONG'}  the HTML page has the text")
    return [] if num_pieces > 1000 else [f"the HTML page has only {num_pieces} pieces"]


def main() -> None:
    """Train, look, and say what is wrong."""
    folder = Path(sys.argv[1])
    try:
        find_chromium()
    except RuntimeError as error:
        sys.exit(f"`make dashboards` needs a browser: {error}.")
    shutil.rmtree(folder / "smoke", ignore_errors=True)
    train(folder)
    print("What a real browser sees of the example's dashboards:")
    with serve(folder) as url, start_chromium() as chromium, open_tensorboard(chromium, url) as dashboard:
        wrong = look(dashboard, folder) + look_at_page(chromium, folder)
    print(f"Pictures of all tabs: {folder}/*.png")
    if wrong:
        sys.exit("\n".join(("Not as it should be:", *wrong)))


if __name__ == "__main__":
    main()

"""Are the bounds in settings.ini true? Makes a fresh environment with the lowest versions it allows, or the newest, and runs the quick tests there.

    python tests/bounds.py lowest --python python3.10
    python tests/bounds.py export --python python3.10
    python tests/bounds.py newest

The export needs a newer torch than the rest, so its lowest versions have an environment of their own. `make bounds` does all three. Each takes minutes
and gigabytes.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLS = ("pytest", "hypothesis")  # what the tests need
QUICK = ("data", "trainer", "scoring", "evaluation", "detector", "cli")
SETS = dict(  # environment -> extras of the package, tests
    lowest=(("data", "log"), QUICK),
    export=(("export",), ("export",)),
    newest=(("data", "log", "export"), (*QUICK, "export")))


def requirements(*keys):
    "Entries of settings.ini, such as torch>=2.6."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return [text for key in keys for text in config["DEFAULT"][key].split()]


def lowest(entries):
    "Each entry with a lower bound, such as torch>=2.6, as torch==2.6; markers stay."
    return [re.sub(r">=([^,;]+)[^;]*", r"==\1", text) for text in entries if ">=" in text]


def constraints(extras):
    "The lowest versions of all that the package with these extras, and `TOOLS`, name; an extra's bound wins over the package's own."
    tools = [text for text in requirements("dev_requirements") if re.split("[<>=]", text)[0] in TOOLS]
    entries = lowest(requirements("requirements", *(f"{extra}_requirements" for extra in extras)) + tools)
    return list({entry.split("==")[0]: entry for entry in entries}.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=SETS)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment")
    args = parser.parse_args()
    extras, tests = SETS[args.which]
    folder, clean = ROOT / f".venv-{args.which}", {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    def run(*command): subprocess.run([str(part) for part in command], cwd=ROOT, env=clean, check=True)
    shutil.rmtree(folder, ignore_errors=True)
    run(args.python, "-m", "venv", folder)
    python, file = folder / "bin" / "python", folder / "constraints.txt"
    file.write_text("\n".join([] if args.which == "newest" else constraints(extras)))
    run(python, "-m", "pip", "install", "--quiet", "--constraint", file, "-e", f".[{','.join(extras)}]", *TOOLS)
    run(python, "-m", "pip", "check")
    run(python, "-m", "pytest", "-q", *(f"tests/test_{name}.py" for name in tests))


if __name__ == "__main__":
    main()

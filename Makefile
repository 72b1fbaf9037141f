# Everything that is done to this project by hand has a name here; `make` alone lists the names.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
DEV := $(VENV)/.dev
APP := $(VENV)/.app
SITE := $(VENV)/.site

DEMO := --dataset digits --abnormal-class 8 --size tiny --isize 32 --epochs 10 --batch-size 32
README_DIR := .

.DEFAULT_GOAL := help
.PHONY: help demo test bench lab app site lint fresh readme bounds lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(CORE) ## train both models on digits with 8 as the defect, beside the baselines
	rm -rf runs/demo-anotrans runs/demo-gannext
	$(BIN)/anogan train --model anotrans $(DEMO) --out runs/demo-anotrans
	$(BIN)/anogan train --model gannext $(DEMO) --out runs/demo-gannext
	@echo "Pictures: runs/demo-anotrans/picture.png and runs/demo-gannext/picture.png"

test: $(DEV) ## all that CI checks: lint, fresh, then pytest, which runs every notebook too
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory fresh
	$(BIN)/python -m pytest -n logical --dist worksteal --cov

DEVICE := cpu

bench: $(CORE) ## how fast training and scoring are, beside a loop as released: 10 to 20 quiet minutes; DEVICE=cuda on a GPU
	$(BIN)/python benchmarks/speed.py --device $(DEVICE)

lab: $(DEV) ## the course in JupyterLab: your own copies, in lab/
	$(BIN)/python course/exercises.py lab
	$(BIN)/jupyter lab --allow-root --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/lab/index.ipynb

app: $(APP) ## the explorer as a web page, with Voilà
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/voila nbs/app/explorer.ipynb

site: $(SITE) ## the course as web pages in site/, to read without a network
	rm -rf site
	$(BIN)/python course/pages.py site

lint: $(DEV) ## ruff, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/lint-imports

# Sums and not `git diff`: it holds in a tree with uncommitted work too, and without git.
fresh: $(DEV) ## export and clean the notebooks; fails where that changes a file
	@sums() { cksum nbs/*.ipynb nbs/app/*.ipynb anogan/*.py | sort; }; before=$$(sums); \
	echo "$(BIN)/nbdev_export; $(BIN)/nbdev_clean"; \
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean || exit 1; \
	after=$$(sums); [ "$$before" = "$$after" ] && exit 0; \
	echo "The notebooks were not clean or anogan/ was not what they export. It is now; look at these files and commit them:" >&2; \
	printf '%s\n%s\n' "$$before" "$$after" | sort | uniq -u | cut -d ' ' -f 3- | sort -u >&2; exit 1

readme: $(DEV) ## write README.md from nbs/index.ipynb
	@$(BIN)/jupyter nbconvert --log-level ERROR --to markdown nbs/index.ipynb --output-dir $(README_DIR) --output README \
		--RegexRemovePreprocessor.patterns='^#\|\s*(hide|default_exp)'
	@sed -E 's#\]\((([0-9]{2}_|app/)[a-z0-9_]+\.ipynb)#](nbs/\1#g; s#\]\(\.\./#](#g' $(README_DIR)/README.md > $(README_DIR)/README.tmp
	@mv $(README_DIR)/README.tmp $(README_DIR)/README.md

LOWEST := $(PYTHON)

bounds: ## are the bounds in settings.ini true? Fresh environments with lowest and newest versions; LOWEST=python3.10
	$(PYTHON) tests/bounds.py lowest --python $(LOWEST)
	$(PYTHON) tests/bounds.py export --python $(LOWEST)
	$(PYTHON) tests/bounds.py newest

lock: $(DEV) ## write requirements.lock: the versions in .venv, which were tested together
	$(BIN)/python -m pip check
	@{ echo "# Tested together; \`make lock\` writes this. $$($(BIN)/python -c 'import platform as p; print(p.python_implementation(), p.python_version(), p.system(), p.machine())')"; \
		$(BIN)/python -m pip freeze --disable-pip-version-check --exclude-editable; } > requirements.lock

clean: ## remove what was made here; lab/ stays, and runs/ but for the demo's
	rm -rf $(VENV) $(VENV)-* site build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov runs/demo-anotrans runs/demo-gannext

# One environment for all. A stamp tells what is installed; it is old when settings.ini or setup.py is newer.
$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "anogan needs Python 3.10 or newer, and '$(PYTHON)' is $$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null || echo missing): name one, as in  make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON)' cannot make a virtual environment: install its venv module (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(CORE): $(VENV)/pyvenv.cfg settings.ini setup.py
	@echo "Installing anogan into $(VENV) (the first time this fetches torch: some minutes and some gigabytes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(DEV): $(VENV)/pyvenv.cfg settings.ini setup.py
	@echo "Installing anogan with its tools into $(VENV) (the first time this fetches torch: some minutes and some gigabytes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(CORE) $(APP) $(SITE) $@

$(APP): $(VENV)/pyvenv.cfg settings.ini setup.py
	@echo "Installing anogan with Voilà into $(VENV) (the first time this fetches torch: some minutes and some gigabytes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[app]'
	@touch $(CORE) $@

$(SITE): $(VENV)/pyvenv.cfg settings.ini setup.py
	@echo "Installing sphinx into $(VENV) (the site needs neither torch nor anogan)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(sed -n 's/^site_requirements = //p' settings.ini)
	@touch $@

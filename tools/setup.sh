#!/usr/bin/env bash
# Create .venv and install what a program needs, once: bash tools/setup.sh train|chat|cpu|gptq|test|all
# all: every part except test. gptq makes each start slower, so install it only if you use it.
# The shell scripts at the root call this on first use. requirements.txt pins every version. PYTHON selects the
# interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-}
case "$what" in
  train | chat | cpu | gptq | test) extras=$what ;;
  all) extras=train,wandb,chat,cpu,gptq ;;
  *) echo "error: tools/setup.sh: unknown part '$what'. Use: bash tools/setup.sh train|chat|cpu|gptq|test|all" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
  echo "error: $python was not found. Install Python 3.11 or newer, or set PYTHON to its path." >&2
  exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: OneCard needs Python 3.11 or newer, $python is $("$python" -V 2>&1 | cut -d" " -f2). Install a newer one, or set PYTHON to its path." >&2
  exit 2
fi

# fail PROBLEM [WORDS]: print our own line, and above it the words of another program if there are any
fail() {
  [ -n "${2:-}" ] && printf '%s\n' "$2" >&2
  echo "error: $1" >&2
  exit 2
}
trap 'echo "stopped by Ctrl-C. Run the same command again to continue." >&2; exit 130' INT

# starts ENVIRONMENT: whether the folder is an environment of venv or conda whose Python starts
starts() {
  "$1/bin/python" -c '
import pathlib, sys
sys.exit(sys.prefix == sys.base_prefix and not pathlib.Path(sys.prefix, "conda-meta").is_dir())
' 2>/dev/null
}

# drop_unfinished ENVIRONMENT: remove what an interrupted pip left. pip writes INSTALLER after all other files of a
# package, and it keeps the files that it replaces under names that begin with ~.
drop_unfinished() {
  "$1/bin/python" -c '
import pathlib, shutil, sysconfig
packages = pathlib.Path(sysconfig.get_path("purelib"))
unfinished = [info for info in packages.glob("*.dist-info") if not (info / "INSTALLER").is_file()]
for folder in [*packages.glob("~*"), *unfinished]:
    shutil.rmtree(folder, ignore_errors=True)
'
}

# has_pip: whether pip in .venv is complete and runs
has_pip() {
  .venv/bin/python -m pip --version >/dev/null 2>&1 &&
    .venv/bin/python -c 'import importlib.metadata; importlib.metadata.version("pip")' 2>/dev/null
}

# put_pip_back: install the pip that comes with Python in place of an incomplete one
put_pip_back() {
  .venv/bin/python -c '
import pathlib, shutil, sysconfig
packages = pathlib.Path(sysconfig.get_path("purelib"))
for folder in [packages / "pip", *packages.glob("pip-*.dist-info")]:
    shutil.rmtree(folder, ignore_errors=True)
' && .venv/bin/python -m ensurepip --upgrade --default-pip && has_pip
}

stamp=.venv/onecard-$what-$(cat requirements.txt pyproject.toml | cksum | cut -d" " -f1)
[ -e "$stamp" ] && starts .venv && exit 0

echo "Setting up .venv for '$what' (once) ..."
no_venv="On Debian and Ubuntu it needs a package: apt install python3-venv"
# venv writes bin/activate last. Python's output is held back, because after Ctrl-C it is a page of traceback.
if ! starts .venv || { [ ! -e .venv/bin/activate ] && [ ! -d .venv/conda-meta ]; }; then
  if [ -L .venv ]; then
    fail ".venv is a link to $(readlink .venv), which is not a complete environment. Remove the link, then run the same command again."
  fi
  if [ -e .venv ]; then echo "The Python in .venv does not start, or .venv was never completed, so it is created again."; fi
  words=$("$python" -m venv --clear .venv 2>&1) || fail "$python could not create .venv; its reason is above. $no_venv" "$words"
fi
drop_unfinished .venv
if ! has_pip; then
  echo "pip is missing or incomplete in .venv, so it is put back."
  words=$(put_pip_back 2>&1) || fail "Python could not put pip into .venv; its reason is above. $no_venv" "$words"
fi
words=$(.venv/bin/python -m pip install --quiet "pip==26.3" 2>&1) ||
  fail "pip could not install its version 26.3; its reason is above. Check the network if that is the reason. Then run the same command again." "$words"
# llama.cpp is compiled here, which takes minutes. Code for exactly this CPU would crash on CPUs that announce AMX
# (llama.cpp issue 20824), so it is compiled for any CPU of the last ten years.
export CMAKE_ARGS="-DGGML_NATIVE=OFF ${CMAKE_ARGS:-}"
if ! .venv/bin/python -m pip install -c requirements.txt -e ".[$extras]"; then
  echo "error: the packages could not be installed; the reason that pip gives is above. Run the same command again to continue." >&2
  exit 2
fi
if [ "$what" = test ] && ! .venv/bin/python -m pip install -c requirements.txt --no-build-isolation deepspeed; then
  echo "error: DeepSpeed could not be installed; the reason that pip gives is above. Run the same command again to continue." >&2
  exit 2
fi
apart=.venv/gptq # an environment of its own, because peft imports gptqmodel at every start wherever it is installed
add_gptqmodel() {
  local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
  if [ ! -e "$apart/whole" ]; then .venv/bin/python -m venv --clear --without-pip "$apart" || return; fi
  printf '%s\n' "$(.venv/bin/python -c "$packages")" "$PWD" >"$("$apart/bin/python" -c "$packages")/beside.pth" &&
    "$apart/bin/python" -m pip install -c requirements.txt gptqmodel optimum &&
    touch "$apart/whole"
}
if [ "$what" = test ] && ! add_gptqmodel; then
  rm -rf "$apart"
  echo "gptqmodel could not be installed, so its tests are skipped."
fi
if [ "$what" = test ] && ! command -v strace >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing strace, which the tests use to kill a save at each system call (without it these tests are skipped) ..."
  { apt-get update && apt-get install --yes --no-install-recommends strace; } >/dev/null || echo "strace could not be installed."
fi
if [[ "$what" = cpu || "$what" = all ]] && ! .venv/bin/python -c "from onecard.conversion import llama_cpp_converter; llama_cpp_converter.home()"; then
  echo "error: llama.cpp's converter could not be downloaded; the reason is above. Run the same command again to continue." >&2
  exit 2
fi
browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if [ "$what" = test ] && ! browser >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing Chromium, in which the tests open the windows (without it these tests are skipped) ..."
  { apt-get update && apt-get install --yes --no-install-recommends chromium fonts-noto-cjk; } >/dev/null || echo "Chromium could not be installed."
fi
touch "$stamp" # written last, so it means that the part is complete
case "$what" in # parts that are complete with it
  test) touch "${stamp/-test-/-train-}" "${stamp/-test-/-chat-}" "${stamp/-test-/-cpu-}" ;;
  all) touch "${stamp/-all-/-train-}" "${stamp/-all-/-chat-}" "${stamp/-all-/-cpu-}" "${stamp/-all-/-gptq-}" ;;
  chat | cpu | gptq) touch "${stamp/-$what-/-train-}" ;;
esac

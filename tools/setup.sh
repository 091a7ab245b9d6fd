#!/usr/bin/env bash
# Create .venv and install what a program needs, once: bash tools/setup.sh train|chat|cpu|gptq|serve|test|all
# all: every part except test. gptq makes each start slower, so install it only if you use it.
# The shell scripts at the root call this on first use. requirements.txt pins every version, and requirements-hashes.txt
# lists the files of these versions; pip installs no other, apart from a build of torch (+cpu, say) without a listed hash.
# HASHES=0 checks the versions alone, for builds of another index. PYTHON selects the interpreter.
#
# A part is complete when its stamp is there, which is written last. Without it everything in .venv is checked, and what
# a stopped set-up left unfinished is made again. A set-up that was stopped at any moment thus needs no more than the
# same command again.
set -euo pipefail
case "${PYTHON:-}" in
  */*) PYTHON=$(realpath -s "$PYTHON") ;; # a relative path means the user's folder, which is left here
esac
cd "$(dirname "$(readlink -f "$0")")/.."
what=${1:-}
case "$what" in
  train | chat | cpu | gptq | serve | test) extras=$what ;;
  all) extras=train,wandb,chat,cpu,gptq,serve ;;
  *) echo "error: tools/setup.sh: unknown part '$what'. Use: bash tools/setup.sh train|chat|cpu|gptq|serve|test|all" >&2; exit 2 ;;
esac

again="Then run the same command again."
# fail PROBLEM [WORDS]: print our own line, and above it the words of another program if there are any
fail() {
  [ -n "${2:-}" ] && printf '%s\n' "$2" >&2
  echo "error: $1" >&2
  exit 2
}
trap 'echo "stopped by Ctrl-C. Run the same command again to continue." >&2; exit 130' INT

# explain WORDS: end with a line of our own if another program failed because of the network or a full disk
explain() {
  case "$1" in
    *"No space left on device"* | *"Disk quota exceeded"*) no_space ;;
    *"after connection broken by"* | *"(from versions: none)"* | *"Max retries exceeded"* | *"Read timed out"*)
      fail "The network did not let pip reach a package index. Check the network, and your proxy and PIP_INDEX_URL if you use them. $again" ;;
  esac
  # ensurepip hides the words of the system, so try whether a file can be written
  case "$({ LC_ALL=C head -c 1048576 /dev/zero >.venv/space; } 2>&1)" in
    *"No space left on device"* | *"Disk quota exceeded"*) rm -f .venv/space && no_space ;;
  esac
  rm -f .venv/space
}
no_space() {
  fail "There is no space left for $PWD/.venv or for the temporary files in ${TMPDIR:-/tmp}. Make room there (df -h shows how full each disk is). $again"
}

# starts ENVIRONMENT: whether the folder is an environment of venv or conda whose Python starts and is new enough
starts() {
  "$1/bin/python" -I -c '
import pathlib, sys
is_environment = sys.prefix != sys.base_prefix or pathlib.Path(sys.prefix, "conda-meta").is_dir()
sys.exit(not is_environment or sys.version_info < (3, 11))
' 2>/dev/null
}

# was_moved ENVIRONMENT: whether venv created it at another path. Its programs and the link to OneCard hold that path.
was_moved() {
  local created
  created=$(sed -nE 's/^command = .* -m venv [^/]*(\/.*)$/\1/p' "$1/pyvenv.cfg" 2>/dev/null) || return 1
  [ -n "$created" ] && ! [ "$created" -ef "$1" ]
}

# drop_unfinished ENVIRONMENT: make pip forget each package of which a file is missing or cut short, so that it installs
# the package again. pip writes INSTALLER and RECORD after all other files of a package, and it keeps the files that it
# replaces under names that begin with ~.
drop_unfinished() {
  "$1/bin/python" -I -c '
import csv, pathlib, shutil, sysconfig
packages = pathlib.Path(sysconfig.get_path("purelib"))

def is_whole(info):
    if not (info / "INSTALLER").is_file():
        return False
    if (info / "INSTALLER").read_text().strip() != "pip":
        return True
    try:
        rows = list(csv.reader((info / "RECORD").read_text(encoding="utf-8").splitlines()))
        files = [(packages / name, size) for name, _, size in rows if not name.endswith(".pyc")]
        return all(path.stat().st_size == int(size or path.stat().st_size) for path, size in files)
    except (OSError, ValueError):
        return False

unfinished = [info for info in packages.glob("*.dist-info") if not is_whole(info)]
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

# create_environment REASON: create .venv, again if it is there. Stamps go first, since they say that it is complete.
create_environment() {
  local python=${PYTHON:-python3} words
  if ! command -v "$python" >/dev/null; then
    fail "$python was not found. Install Python 3.11 or newer, or set PYTHON to its path."
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    fail "OneCard needs Python 3.11 or newer, $python is $("$python" -V 2>&1 | cut -d" " -f2). Install a newer one, or set PYTHON to its path."
  fi
  if [ -L .venv ]; then
    fail ".venv is a link to $(readlink .venv). $1 Remove the link, then run the same command again."
  fi
  if [ -e .venv ]; then echo "$1 So .venv is created again."; fi
  rm -f .venv/onecard-*
  if ! words=$("$python" -m venv --clear .venv 2>&1); then
    explain "$words"
    fail "$python could not create .venv; its reason is above. $no_venv" "$words"
  fi
}

# run_pip WHAT ARGUMENTS...: install WHAT, and show at once what pip says
run_pip() {
  local words
  if ! { words=$(.venv/bin/python -m pip install "${@:2}" 2>&1 >&3 3>&- | tee >(cat >&2)); } 3>&1; then
    case "$words" in
      *"DO NOT MATCH THE HASHES"* | *"Hashes are required"*)
        fail "$1 could not be installed: requirements-hashes.txt does not list a file that pip names above. If you want this file all the same, such as a build of torch from another index, set HASHES=0." ;;
    esac
    explain "$words"
    fail "$1 could not be installed; the reason that pip gives is above. Run the same command again to continue."
  fi
}

# pin PACKAGE: its line of requirements.txt, NAME==VERSION
pin() { grep -o "^$1==[^ ]*" requirements.txt; }

# needs EXTRAS: the packages that these extras of pyproject.toml name, one a line; extras that they include too
needs() {
  .venv/bin/python -I -c '
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
names = sys.argv[1].split(",")
for name in names:  # it grows
    for line in extras[name]:
        if line.startswith("onecard["):
            names += [each for each in line[8:-1].split(",") if each not in names]
        else:
            print(line)
' "$1"
}

# build_of NAME==VERSION: the same with the local version, such as +cpu, that is installed or that pip would take without
# hashes. With hashes it prefers a file whose index names its hash, which is the CUDA build, even if the build for the CPU
# lies on this disk.
build_of() {
  .venv/bin/python -I -c '
import importlib.metadata, json, subprocess, sys
name, _, version = sys.argv[1].partition("==")
builds = [each.version for each in importlib.metadata.distributions(name=name)]
if not any(each.partition("+")[0] == version for each in builds):
    command = [sys.executable, "-m", "pip", "index", "versions", name, "--json"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    builds = json.loads(listed.stdout)["versions"] if listed.stdout else []
print(name, next((each for each in builds if each.partition("+")[0] == version), version), sep="==")
' "$1"
}

# add_unlisted NAME==VERSION+BUILD: install this build by itself if requirements-hashes.txt does not name its file, since
# there is no hash to check then. A file that the list names is left to the check of all packages.
add_unlisted() {
  local file
  if [ "${HASHES:-1}" = 0 ]; then return; fi
  file=$(.venv/bin/python -m pip install --quiet --dry-run --no-deps --report - "$1" 2>/dev/null | .venv/bin/python -I -c '
import json, pathlib, sys, urllib.parse
for package in json.loads(sys.stdin.read() or "{}").get("install", []):
    print(pathlib.PurePosixPath(urllib.parse.unquote(package["download_info"]["url"])).name)
') || return 0 # the check of all packages says what is wrong
  if [ -z "$file" ] || grep -qF "# $file" requirements-hashes.txt; then return; fi
  echo "warning: the hash of $file is not checked, because requirements-hashes.txt does not list this build."
  run_pip "$1" --no-deps "$1"
}

release=$(cat requirements.txt pyproject.toml | cksum | cut -d" " -f1)
stamp=.venv/onecard-$what-$release
is_complete() { [ -e "$stamp" ] && starts .venv && ! was_moved .venv; }
if is_complete; then exit 0; fi

# Only one set-up may change .venv. Its programs inherit the lock, so it lasts until the last of them has ended.
{ true >>.venv.lock; } 2>/dev/null || fail "$PWD cannot be written, and .venv has to be created there."
exec 9>>.venv.lock
if ! flock --nonblock 9; then
  echo "Another set-up is running here; waiting for it to end ..."
  flock 9
  if is_complete; then exit 0; fi
fi

echo "Setting up .venv for '$what' (once) ..."
no_venv="On Debian and Ubuntu it needs a package: apt install python3-venv"
# venv writes bin/activate last. Python's output is held back, because after Ctrl-C it is a page of traceback.
if ! starts .venv || { [ ! -e .venv/bin/activate ] && [ ! -d .venv/conda-meta ]; }; then
  create_environment "Its Python does not start or is older than 3.11, or it was never completed."
elif was_moved .venv; then
  create_environment "It was created in another folder, where its programs would look for Python."
fi
find .venv/ -maxdepth 1 -name 'onecard-*' ! -name "*-$release" -delete # their versions are about to be replaced
drop_unfinished .venv
if ! has_pip; then
  echo "pip is missing or incomplete in .venv, so it is put back."
  if ! words=$(put_pip_back 2>&1); then
    explain "$words"
    fail "Python could not put pip into .venv; its reason is above. $no_venv" "$words"
  fi
fi
pinned=(--require-hashes -c requirements-hashes.txt)
if [ "${HASHES:-1}" = 0 ]; then pinned=(-c requirements.txt -c requirements-cuda.txt); fi
# older versions of pip do not take hashes from constraints
if ! words=$(.venv/bin/python -m pip install --quiet --require-hashes -r <(sed -n '/^pip==/,/[^\\]$/p' requirements-hashes.txt) 2>&1); then
  explain "$words"
  fail "pip could not install its pinned version; its reason is above. $again" "$words"
fi
# llama.cpp is compiled here, which takes minutes. Code for exactly this CPU would crash on CPUs that announce AMX
# (llama.cpp issue 20824), so it is compiled for any CPU of the last ten years.
export CMAKE_ARGS="-DGGML_NATIVE=OFF ${CMAKE_ARGS:-}"
words=$(needs "$extras") || fail "The packages of '$what' could not be read from pyproject.toml; the reason is above."
mapfile -t packages <<<"$words"
for index in "${!packages[@]}"; do
  case "${packages[index]}" in
    torch==*)
      packages[index]=$(build_of "${packages[index]}")
      case "${packages[index]}" in *+*) add_unlisted "${packages[index]}" ;; esac ;;
  esac
done
run_pip "The packages" "${pinned[@]}" "${packages[@]}" "$(pin setuptools)"
run_pip OneCard --no-deps --no-build-isolation -e . # no hash: it is this folder
if [ "$what" = test ]; then run_pip DeepSpeed "${pinned[@]}" --no-build-isolation "$(pin deepspeed)"; fi
apart=.venv/gptq # an environment of its own, because peft imports gptqmodel at every start wherever it is installed
add_gptqmodel() {
  local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
  if [ ! -e "$apart/whole" ]; then .venv/bin/python -m venv --clear --without-pip "$apart" || return; fi
  printf '%s\n' "$(.venv/bin/python -c "$packages")" "$PWD" >"$("$apart/bin/python" -c "$packages")/beside.pth" &&
    rm -f "$apart/whole" &&
    "$apart/bin/python" -m pip install "${pinned[@]}" gptqmodel optimum &&
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
if [[ "$what" = cpu || "$what" = serve || "$what" = all ]] && ! .venv/bin/python -c "from onecard.conversion import llama_cpp_converter; llama_cpp_converter.home()"; then
  echo "error: llama.cpp's converter could not be downloaded; the reason is above. Run the same command again to continue." >&2
  exit 2
fi
browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if [ "$what" = test ] && ! browser >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing Chromium, in which the tests open the windows (without it these tests are skipped) ..."
  { apt-get update && apt-get install --yes --no-install-recommends chromium fonts-noto-cjk; } >/dev/null || echo "Chromium could not be installed."
fi
sync -f .venv # so that a power failure cannot leave the stamp without what it stands for
touch "$stamp" # written last, so it means that the part is complete
includes=() # parts that are complete with it
case "$what" in
  test) includes=(train chat cpu serve) ;;
  all) includes=(train chat cpu gptq serve) ;;
  serve) includes=(train cpu) ;;
  chat | cpu | gptq) includes=(train) ;;
esac
for part in ${includes[@]+"${includes[@]}"}; do touch "${stamp/-$what-/-$part-}"; done

"""`python .ci/wheel_files.py WHEEL`: does a wheel hold what the repository has of clipx, configs
included, and nothing else?"""

import subprocess
import sys
import zipfile

tracked = subprocess.run(
    ["git", "ls-files", "clipx", "configs"], check=True, capture_output=True, text=True
)
expected = {
    f"clipx/{name}" if name.startswith("configs/") else name for name in tracked.stdout.split()
}
with zipfile.ZipFile(sys.argv[1]) as wheel:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
if files != expected:
    sys.exit(f"missing: {sorted(expected - files)}\nunexpected: {sorted(files - expected)}")
print(f"{len(files)} files")

#!/usr/bin/env bash
# report.pdf from the results of runs:
#
#   report/build.sh                 from report/results
#   report/build.sh RESULTS_DIR     from another folder, such as results/report with your own runs
#
#   AUTHOR="Ada Lovelace"           your name under the title
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
results=$(realpath "${1:-$here/results}")
[ -d "$results" ] || { echo "error: no folder $results" >&2 && exit 2; }
command -v pdflatex >/dev/null || {
  echo "error: no pdflatex; on Debian and Ubuntu: apt install --no-install-recommends texlive-latex-recommended" \
    "texlive-latex-extra texlive-fonts-recommended lmodern" >&2
  exit 2
}
cd "$here"
rm -rf generated
export SOURCE_DATE_EPOCH=0 FORCE_SOURCE_DATE=1 # the same bytes from the same results
"$here/../setup_env.sh" python tables.py "$results" generated
"$here/../setup_env.sh" python gradients.py generated
echo "${AUTHOR:-}" >generated/author.tex
for _ in 1 2; do # twice, for the references
  pdflatex -interaction=nonstopmode -halt-on-error report.tex >generated/pdflatex.log || {
    grep -A 5 '^!' generated/pdflatex.log >&2
    exit 1
  }
done
last=$(sed -n 's/^.newlabel{end-of-text}{{[^}]*}{\([0-9]*\)}.*/\1/p' report.aux)
echo "report.pdf: $(grep -ao '[0-9]* page' generated/pdflatex.log | tail -n 1)s, text to page $last"
[ "$results" = "$here/results" ] ||
  echo "the text draws its conclusions from report/results: read them again with the new numbers"
missing=$(grep -a '^missing: ' generated/pdflatex.log | sort -u | wc -l) || true
((missing == 0)) || echo "n/a in $missing places: not all runs of report/experiments.sh are in $results"
rm -f report.aux report.log report.out
! grep -aE 'Overfull .hbox \([0-9]{2,}|undefined' generated/pdflatex.log

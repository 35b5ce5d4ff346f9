// The theme makes these parts as a page is shown: buttons of code blocks without a name that tells them apart, and tables
// that scroll where a keyboard cannot reach them.
let numBlocks = 0
function mend() {
  document.querySelectorAll("nav.md-code__nav:not([aria-label])").forEach(nav => {
    numBlocks += 1
    nav.setAttribute("aria-label", `Code block ${numBlocks}`)
  })
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach(table => { table.tabIndex = 0 })
}
new MutationObserver(mend).observe(document.documentElement, { childList: true, subtree: true })
mend()

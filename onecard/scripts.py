"""What the windows do in the browser itself: JavaScript that gradio's events call.

A tab has its own sessionStorage, which a reload keeps.
"""

# browsers give navigator.clipboard to https and to this machine alone
COPY = """() => {
  const text = document.querySelector('#output .answer')?.innerText ?? '';
  if (navigator.clipboard) { navigator.clipboard.writeText(text); return; }
  const box = document.createElement('textarea');
  box.value = text;
  box.style.cssText = 'position: fixed; opacity: 0';
  document.body.append(box);
  box.select();
  document.execCommand('copy');
  box.remove();
}"""
TOGGLE_DARK = "() => { document.body.classList.toggle('dark'); }"
FOCUS = "() => document.querySelector('#box textarea')?.focus()"
DOWNLOAD = """(line) => {
  if (!line) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([line], {type: 'application/jsonl'}));
  link.download = 'chat-' + new Date().toISOString().slice(0, 19).replace(/[:T]/g, '-') + '.jsonl';
  link.click();
}"""
# chat: JSON; gives what is to be shown: nothing, or that it was too much (%s)
KEEP_CHAT = """(chat) => {
  try { sessionStorage.setItem('onecard-chat', chat); return ''; } catch (full) { return %s; }
}"""
# not before what was kept is shown, or a new page would keep its own empty boxes
KEEP_TEXTS = """(...texts) => {
  if (!window.onecardKept) return;
  try { sessionStorage.setItem('onecard-texts', JSON.stringify(texts)); } catch (full) { }
}"""
KEPT_CHAT = "() => [sessionStorage.getItem('onecard-chat') || '[]']"
KEPT_TEXTS = """(...texts) => {
  window.onecardKept = true;
  let kept = null;
  try { kept = JSON.parse(sessionStorage.getItem('onecard-texts')); } catch (broken) { }
  const whole = Array.isArray(kept) && kept.length === texts.length;
  return whole ? kept.map(String) : texts;
}"""

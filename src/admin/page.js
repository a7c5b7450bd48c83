// Keeps the page as it is in the daemon. Without scripts the page loads itself anew.
(() => {
  const LOST_MS = 10000; // the daemon says something every second
  const summary = document.getElementById("summary");
  const live = document.getElementById("live");
  const rest = document.title.slice(document.title.indexOf(" · "));
  const say = (text) => { if (live.textContent !== text) live.textContent = text; };

  // Touches only what differs: what somebody has selected or points at stays as it is.
  const become = (old, now) => {
    if (old.nodeName !== now.nodeName) return old.replaceWith(now);
    if (old.nodeType === Node.TEXT_NODE) { if (old.data !== now.data) old.data = now.data; return; }
    for (const { name } of [...old.attributes]) if (!now.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of now.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    contain(old, now);
  };
  const contain = (old, now) => {
    const was = [...old.childNodes], is = [...now.childNodes];
    is.forEach((node, n) => was[n] ? become(was[n], node) : old.append(node));
    was.slice(is.length).forEach((node) => node.remove());
  };
  const show = (sections) => {
    for (const [id, html] of Object.entries(sections)) {
      const template = document.createElement("template");
      template.innerHTML = html;
      const section = document.getElementById(id);
      if (section) contain(section, template.content);
    }
    document.title = summary.textContent + rest;
  };

  let since;
  const connect = () => {
    const events = new EventSource("events");
    const lost = () => {
      events.close();
      since ??= new Date().toLocaleTimeString();
      document.body.className = "stale";
      document.title = "not live" + rest;
      say(`not live since ${since}: the daemon does not answer; trying again`);
      connect();
    };
    let timer = setTimeout(lost, LOST_MS);
    events.addEventListener("sections", (event) => {
      clearTimeout(timer);
      timer = setTimeout(lost, LOST_MS);
      since = undefined;
      document.body.className = "";
      show(JSON.parse(event.data));
      say("live");
    });
  };
  connect();
})();

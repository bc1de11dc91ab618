const canvas = element.querySelector('canvas'), cursor = element.querySelector('.cursor');
const pen = canvas.getContext('2d'), color = element.querySelector('input[type=color]');
const paper = canvas.dataset.paper, ink = canvas.dataset.ink, side = canvas.width;
const cells = Number(canvas.dataset.cells), cell = side / cells;
let last = null, x = Math.floor(cells / 2), y = x;
const say = () => { props.value = canvas.toDataURL('image/png'); };
const clear = () => { pen.fillStyle = paper; pen.fillRect(0, 0, side, side); say(); };
const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * side / box.width, (event.clientY - box.top) * side / box.height];
};
const hue = () => color ? color.value : ink;
canvas.addEventListener('pointerdown', (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = at(event);
    pen.fillStyle = hue();
    pen.beginPath(); pen.arc(last[0], last[1], side / 16, 0, 7); pen.fill();
});
canvas.addEventListener('pointermove', (event) => {
    if (!last) return;
    const next = at(event);
    pen.strokeStyle = hue(); pen.lineWidth = side / 8; pen.lineCap = 'round';
    pen.beginPath(); pen.moveTo(...last); pen.lineTo(...next); pen.stroke();
    last = next;
});
const end = () => { if (last) { last = null; say(); } };
canvas.addEventListener('pointerup', end);
canvas.addEventListener('pointercancel', end);
const show = () => {
    cursor.style.left = 100 * x / cells + '%'; cursor.style.top = 100 * y / cells + '%';
    cursor.style.width = cursor.style.height = 100 / cells + '%';
};
canvas.addEventListener('keydown', (event) => {
    const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    if (event.key in moves) {
        x = Math.min(cells - 1, Math.max(0, x + moves[event.key][0]));
        y = Math.min(cells - 1, Math.max(0, y + moves[event.key][1]));
    } else if (event.key === ' ') {
        pen.fillStyle = hue(); pen.fillRect(x * cell, y * cell, cell, cell); say();
    } else return;
    event.preventDefault(); show();
});
element.querySelector('.wipe').addEventListener('click', clear);
show(); clear();

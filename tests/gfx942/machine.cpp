// An interpreter of AMD CDNA3 (gfx942) code: the launch of a grid of workgroups.
#include <cfenv>
#include <memory>

#include "instructions.h"

static void start(Wave& w, const Launch& launch, const u32* number) {
    w.pc = launch.entry, w.epoch = 1, w.scc = 0, w.steps = 0;
    w.done = w.waiting = w.scalar_loads = false;
    w.vm.clear(), w.lgkm.clear();
    std::fill_n(w.v_pending, 512, -1), std::fill_n(w.s_pending, 128, -1);
    std::fill_n(&w.v[0][0], 512 * LANES, POISON), std::fill_n(w.s, 128, POISON);
    u32* next = std::copy_n(launch.user, launch.user_size, w.s);
    for (int k = 0; k < 3; k++)
        if (launch.identity[k]) *next++ = number[k];
    const int lanes = std::min<int>(LANES, launch.threads - LANES * w.number);
    w.set_pair(EXEC, ~0ull >> (LANES - lanes));
    EACH w.v[0][l] = LANES * w.number + l;
}
static void step(Wave& w) {
    const Launch& launch = w.machine->launch;
    const Instruction& i = launch.code[w.pc];
    launch.count[w.pc++]++;
    operations[i.operation](w, i);
    if (++w.steps > launch.most_steps) found(w, i, ENDLESS, 0, 0);
}
static void run_workgroup(Machine& m, std::vector<std::unique_ptr<Wave>>& waves) {
    const Launch& launch = m.launch;
    auto runs = [&](const Wave& w) { return !w.done && !w.waiting && !m.failed; };
    for (size_t alive = waves.size(); alive && !m.failed;) {
        for (bool any = true; any;) {
            any = false;
            for (size_t k = 0; k < waves.size(); k++) {
                Wave& w = *waves[launch.order == 1 ? waves.size() - 1 - k : k];
                for (bool more = runs(w); more; more = runs(w) && launch.order != 2) step(w), any = true;
            }
        }
        const Wave* first = nullptr;
        alive = 0;
        for (auto& w : waves) {
            if (w->done) continue;
            if (first && first->barrier != w->barrier)
                found(*w, launch.code[w->barrier], WAVES_AT_DIFFERENT_BARRIERS, 0, 0);
            first = first ? first : w.get(), alive++, w->waiting = false, w->epoch++;
        }
        if (first && alive < waves.size())
            found(*waves[0], launch.code[first->barrier], WAVES_AT_DIFFERENT_BARRIERS, 0, 0);
    }
}

extern "C" int operation_number(const char* name) {
    if (operations.empty()) define_scalar(), define_integer(), define_float(), define_memory();
    auto it = numbers.find(name);
    return it == numbers.end() ? -1 : it->second;
}
extern "C" int size_of(int what) {
    return what == 0 ? sizeof(Instruction) : what == 1 ? sizeof(Launch) : sizeof(Finding);
}
extern "C" int run(const Launch* given) {
    const Launch& launch = *given;
    std::fenv_t environment;
    std::fegetenv(&environment), std::fesetenv(FE_DFL_ENV);
    ulps = launch.inexact;
    Machine m{launch};
    m.shadows.push_back({{0, launch.lds}, 0, LDS_RACE, LDS_NOT_WAITED_FOR_BEFORE_THE_BARRIER, {}});
    for (int k = 0; k < launch.watched_size; k++) {
        const Region& region = launch.watched[k];
        m.shadows.push_back({region, 1, RACE, NOT_WAITED_FOR_BEFORE_THE_BARRIER,
                             std::vector<Cell>((region.high - region.low) / 2 + 2)});
    }
    std::vector<std::unique_ptr<Wave>> waves((launch.threads + LANES - 1) / LANES);
    for (size_t k = 0; k < waves.size(); k++) {
        waves[k] = std::make_unique<Wave>();
        waves[k]->number = int(k), waves[k]->machine = &m;
    }
    u32 number[3];
    for (number[2] = 0; number[2] < launch.grid[2]; number[2]++)
        for (number[1] = 0; number[1] < launch.grid[1]; number[1]++)
            for (number[0] = 0; number[0] < launch.grid[0] && !m.failed; number[0]++, m.workgroup++) {
                m.records.clear(), m.lds.resize(launch.lds), m.shadows[0].cells.assign(launch.lds, Cell());
                for (u32 k = 0; k < launch.lds; k++) m.lds[k] = u8(POISON >> 8 * (k & 3));
                for (auto& w : waves) start(*w, launch, number);
                run_workgroup(m, waves);
            }
    std::fesetenv(&environment);
    return m.findings;
}

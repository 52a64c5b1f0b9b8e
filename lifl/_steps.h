/* A point at which a process may be killed: tests/crash kills between any two of them. Nothing in a release. */
#ifndef LIFL_STEPS_H
#define LIFL_STEPS_H
#ifdef LIFL_STEPS
void lifl_step(void);
#define STEP() lifl_step()
#else
#define STEP() ((void)0)
#endif
#endif

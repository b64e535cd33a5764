"""Run the job's scheduler and writer with simulated workers: what a thousand workers ask of one driver.

Time is virtual. What is real: the catalogue and its order, the scheduler, progress and metrics of a job, and with
--output its sink; their processor time and memory are measured. What is simulated: Ray and the workers. A worker is
tools.simulate.engine.SimulatedEngine: it prefills one document at a time, before anything else, and decodes all that
it holds as one batch; reading, tokenising and the network take no time, and memory always suffices for `max_live`
documents. What Ray costs is measured apart (--ray-overhead) and charged to the driver as --driver-ms.
"""

/* A thread that moves one rank's calls on while the rank computes; see mpidl_node.h.
 *
 * Ordering. Calls are moved on by the thread only, one after the other in the order in which they were given. What it
 * wrote of a call, the caller may read once it has seen, under the lock, that the call has ended.
 */
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "include/mpidl_node.h"
#include "node/flags.h"

enum { PATIENCE = 2000000 }; /* nanoseconds, after which the thread looks whether it is to end */

struct mpidl_helper {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t given, ended;
    mpidl_node *node;
    mpidl_job *first, *last;
    bool leaving;
};

static void end_first(mpidl_helper *helper, int progress) {
    mpidl_job *job = helper->first;
    helper->first = job->next;
    job->result = progress;
    job->ended = 1;
    pthread_cond_broadcast(&helper->ended);
}

static void *work(void *argument) {
    mpidl_helper *helper = argument;
    pthread_mutex_lock(&helper->lock);
    while (!helper->leaving) {
        if (!helper->first) {
            pthread_cond_wait(&helper->given, &helper->lock);
            continue;
        }
        mpidl_job *job = helper->first;
        pthread_mutex_unlock(&helper->lock);
        int progress = mpidl_node_advance(helper->node, job, PATIENCE);
        pthread_mutex_lock(&helper->lock);
        if (progress != MPIDL_WAITING) {
            end_first(helper, progress);
        }
    }
    pthread_mutex_unlock(&helper->lock);
    return NULL;
}

/* Signals are the business of the program's own threads. */
static int start_thread(mpidl_helper *helper) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int status = pthread_create(&helper->thread, NULL, work, helper);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return status;
}

mpidl_helper *mpidl_helper_start(mpidl_node *node) {
    mpidl_helper *helper = calloc(1, sizeof *helper);
    if (!helper) {
        return NULL;
    }
    helper->node = node;
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&helper->lock, NULL);
    pthread_cond_init(&helper->given, NULL);
    pthread_cond_init(&helper->ended, &clock);
    pthread_condattr_destroy(&clock);
    if (start_thread(helper) != 0) {
        free(helper);
        return NULL;
    }
    return helper;
}

void mpidl_helper_give(mpidl_helper *helper, mpidl_job *job) {
    job->next = NULL;
    job->ended = 0;
    pthread_mutex_lock(&helper->lock);
    if (helper->first) {
        helper->last->next = job;
    } else {
        helper->first = job;
    }
    helper->last = job;
    pthread_cond_signal(&helper->given);
    pthread_mutex_unlock(&helper->lock);
}

int mpidl_helper_wait(mpidl_helper *helper, mpidl_job *job, int64_t patience) {
    int64_t until = nanoseconds_now() + patience;
    struct timespec limit = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};
    pthread_mutex_lock(&helper->lock);
    while (!job->ended && patience > 0 && pthread_cond_timedwait(&helper->ended, &helper->lock, &limit) == 0) {
    }
    int progress = job->ended ? job->result : MPIDL_WAITING;
    pthread_mutex_unlock(&helper->lock);
    return progress;
}

void mpidl_helper_stop(mpidl_helper *helper) {
    pthread_mutex_lock(&helper->lock);
    helper->leaving = true;
    pthread_cond_signal(&helper->given);
    pthread_mutex_unlock(&helper->lock);
    pthread_join(helper->thread, NULL);
    pthread_mutex_destroy(&helper->lock);
    pthread_cond_destroy(&helper->given);
    pthread_cond_destroy(&helper->ended);
    free(helper);
}
